"""The subcommands of `hessianflow`: each module adds its parsers and holds what they run."""
