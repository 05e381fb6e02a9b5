// Runs the AMX instructions of csrc/linear_amx.cc on CPUs without them, one trap each.
//
// Part of the module when built with -DSPECMOEOFF_EMULATE_AMX=ON (`make amx`). An instruction that
// this CPU does not know raises SIGILL (pytest wants that signal too: -p no:faulthandler); the
// handler decodes and carries out the six that tiles need, as Intel's manual defines them, and
// aborts on any other and on shapes that a CPU would refuse. So the machine code itself is tested;
// what is not is the permission of the kernel, and speed.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct Tiles {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes;
  char data[8][16][64];
};
thread_local Tiles tiles;

[[noreturn]] void Refuse(const char* why) {
  if (write(STDERR_FILENO, why, strlen(why)) < 0) _exit(1);
  abort();
}

void Require(bool holds, const char* why) {
  if (!holds) Refuse(why);
}

int Rows(int tile) { return tiles.shapes.rows[tile]; }
int RowBytes(int tile) { return tiles.shapes.row_bytes[tile]; }

void RequireUsed(int tile) {
  Require(tile < 8 && tiles.shapes.palette == 1 && Rows(tile) && RowBytes(tile),
          "amx: a tile without a shape is used\n");
}

void Configure(const void* memory) {
  memcpy(&tiles.shapes, memory, sizeof(tiles.shapes));
  Require(tiles.shapes.palette == 1 && tiles.shapes.start_row == 0, "amx: bad palette\n");
  for (const uint8_t byte : tiles.shapes.reserved) Require(byte == 0, "amx: reserved byte set\n");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = Rows(tile), bytes = RowBytes(tile);
    Require(tile < 8 || (rows == 0 && bytes == 0), "amx: more than eight tiles\n");
    Require(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0), "amx: bad shape\n");
  }
  // A CPU leaves zeros; NaN shows who relies on that.
  memset(tiles.data, 0xff, sizeof(tiles.data));
}

float Widen(const char* bfloat16) {
  uint32_t bits = 0;
  memcpy(reinterpret_cast<char*>(&bits) + 2, bfloat16, 2);
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Denormals are taken as zero, and results that are denormal become zero.
float Flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

void Dot(int sum, int a, int b) {
  RequireUsed(sum), RequireUsed(a), RequireUsed(b);
  Require(sum != a && sum != b && a != b, "amx: a tile is used twice\n");
  Require(Rows(sum) == Rows(a) && RowBytes(sum) == RowBytes(b) && RowBytes(a) == 4 * Rows(b) &&
              RowBytes(sum) % 4 == 0,
          "amx: shapes do not fit\n");
  for (int m = 0; m < Rows(sum); ++m) {
    for (int n = 0; n < RowBytes(sum) / 4; ++n) {
      float parts[2] = {0.0f, 0.0f};
      for (int k = 0; k < RowBytes(a) / 4; ++k) {
        for (int odd = 0; odd < 2; ++odd) {
          const float x = Flush(Widen(tiles.data[a][m] + 4 * k + 2 * odd));
          const float y = Flush(Widen(tiles.data[b][k] + 4 * n + 2 * odd));
          parts[odd] = Flush(std::fma(x, y, parts[odd]));
        }
      }
      float old;
      memcpy(&old, tiles.data[sum][m] + 4 * n, sizeof(old));
      const float result = Flush(Flush(old) + Flush(parts[0] + parts[1]));
      memcpy(tiles.data[sum][m] + 4 * n, &result, sizeof(result));
    }
  }
}

// One VEX-encoded instruction, decoded as far as tiles need it.
struct Instruction {
  const uint8_t* at;
  const greg_t* registers;
  const uint8_t* modrm;
  const uint8_t* end;
  int prefix, opcode, reg, rm, vvvv;
  bool in_memory;
  char* address;   // memory operand without its index
  int64_t stride;  // its index, scaled
};

int64_t Register(const Instruction& i, int number) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return i.registers[kOrder[number]];
}

// The memory operand: [base + index * scale + displacement], or [rip + displacement].
void DecodeAddress(Instruction* i, int mod, bool high_base, bool high_index) {
  int64_t displacement = 0, base = 0;
  const uint8_t* p = i->modrm + 1;
  int base_number = i->rm;
  bool has_base = true, from_rip = false;
  if (i->rm == 4) {
    const int scale = *p >> 6, index = (*p >> 3 & 7) | high_index << 3;
    base_number = *p++ & 7;
    if (index != 4) i->stride = Register(*i, index) * (1 << scale);
    has_base = !(base_number == 5 && mod == 0);
  } else {
    from_rip = i->rm == 5 && mod == 0;
  }
  if (mod == 1) {
    displacement = static_cast<int8_t>(*p++);
  } else if (mod == 2 || from_rip || !has_base) {
    int32_t wide;
    memcpy(&wide, p, sizeof(wide));
    displacement = wide;
    p += 4;
  }
  i->end = p;
  if (from_rip) {
    base = reinterpret_cast<int64_t>(p);
  } else if (has_base) {
    base = Register(*i, base_number | high_base << 3);
  }
  i->address = reinterpret_cast<char*>(base + displacement);
}

Instruction Decode(const greg_t* registers) {
  Instruction i{};
  i.registers = registers;
  i.at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  // Three-byte VEX, opcode map 0F38, 128 bits, W = 0.
  Require(i.at[0] == 0xc4 && (i.at[1] & 0x1f) == 2 && (i.at[2] & 0x84) == 0,
          "amx: an instruction that no tile needs\n");
  i.prefix = i.at[2] & 3;
  i.vvvv = ~(i.at[2] >> 3) & 15;
  i.opcode = i.at[3];
  i.modrm = i.at + 4;
  const int mod = *i.modrm >> 6;
  i.reg = *i.modrm >> 3 & 7;
  i.rm = *i.modrm & 7;
  i.in_memory = mod != 3;
  i.end = i.modrm + 1;
  if (i.in_memory) DecodeAddress(&i, mod, !(i.at[1] & 0x20), !(i.at[1] & 0x40));
  return i;
}

void Execute(const Instruction& i) {
  constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;
  if (i.opcode == 0x49 && i.prefix == kNone) {
    if (i.in_memory) return Configure(i.address);
    tiles.shapes = {};
  } else if (i.opcode == 0x49 && i.prefix == kF2 && !i.in_memory) {
    RequireUsed(i.reg);
    memset(tiles.data[i.reg], 0, sizeof(tiles.data[i.reg]));
  } else if (i.opcode == 0x4b && i.in_memory && (i.prefix == kF2 || i.prefix == k66)) {
    RequireUsed(i.reg);
    memset(tiles.data[i.reg], 0, sizeof(tiles.data[i.reg]));
    for (int r = 0; r < Rows(i.reg); ++r) {
      memcpy(tiles.data[i.reg][r], i.address + r * i.stride, RowBytes(i.reg));
    }
  } else if (i.opcode == 0x4b && i.in_memory && i.prefix == kF3) {
    RequireUsed(i.reg);
    for (int r = 0; r < Rows(i.reg); ++r) {
      memcpy(i.address + r * i.stride, tiles.data[i.reg][r], RowBytes(i.reg));
    }
  } else if (i.opcode == 0x5c && i.prefix == kF3 && !i.in_memory) {
    Dot(i.reg, i.rm, i.vvvv);
  } else {
    Refuse("amx: an instruction that no tile needs\n");
  }
}

void OnIllegalInstruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction = Decode(registers);
  Execute(instruction);
  registers[REG_RIP] = reinterpret_cast<greg_t>(instruction.end);
}

__attribute__((constructor)) void Install() {
  struct sigaction action{};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
