"""The commands of `hycam`, one module each with `run(options)`; imported only when one is called."""
