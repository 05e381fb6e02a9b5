"""The engine: scheduler, forward pass, verification, and the plan of the memory they share."""
