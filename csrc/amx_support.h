// Whether this process may use the tiles of AMX-BF16.
#pragma once

namespace specmoeoff {

// True if the CPU has the instructions, the operating system keeps the tiles' state, and Linux has
// let this process use them: it lets only those who ask, since tiles make signal frames larger. The
// permission is asked for here, holds for all threads, and asking again is harmless.
bool HasTiles();

}  // namespace specmoeoff
