"""One module a command; `run(args)` parses, calls the library and prints."""
