"""One loss a file: pure functions of callables and arrays that read like the paper's algorithm."""
