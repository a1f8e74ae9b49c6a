// The same with vectors of 512 bits, which is for the compiler: pyproject.toml has its options.

#include "_native.cpp"
