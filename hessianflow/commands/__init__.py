"""The subcommands of `hessianflow`. Each module adds parsers and the functions that they call."""
