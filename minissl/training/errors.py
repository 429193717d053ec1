"""Errors that libraries raise when memory or a compiler is missing, each in its own words."""


OUT_OF_MEMORY = [
    "out of memory",                        # CUDA, MPS
    "can't allocate memory",                # the CPU on Linux and macOS
    "not enough memory",                    # the CPU on Windows
    "storage size calculation overflowed",  # more than any machine has: torch
    "overflow when unpacking long",         # torch
    "larger than the maximum possible size",          # NumPy
    "int too large to convert to c",        # Python, for sizes that NumPy or torch asked for
    "int too big to convert",
    "cannot fit 'int' into an index-sized integer",
]


def is_out_of_memory(error):
    """Whether the machine has too little memory, in whatever words a library says it."""
    if isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return any(part in message for part in OUT_OF_MEMORY)


def is_compiler_error(error):
    """Whether torch.compile has failed, for example because there is no C++ compiler."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
