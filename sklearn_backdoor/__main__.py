"""The command line: ``python -m sklearn_backdoor``."""

from sklearn_backdoor.cli import main

if __name__ == "__main__":
    main()
