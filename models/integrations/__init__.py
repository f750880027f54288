"""EDJE inside other libraries, one module each; a module imports its library, which the core does not need."""
