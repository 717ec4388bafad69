"""The mathematics of CPGD: pure functions on tensors of one process; imports torch only."""
