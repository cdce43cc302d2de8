//! Authority during a move: who may run the machine, as sans-I/O state machines (design 4a).
