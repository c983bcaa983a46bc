"""The `fastmae` command, also as `python -m fastmae`."""

from fastmae.runtime.startup import prepare


def main() -> None:
    """Run the command of the command line; exits with the contract's code."""
    prepare()
    from fastmae import cli  # noqa: PLC0415 - takes time, in which Ctrl-C may come

    cli.main()


if __name__ == "__main__":
    main()
