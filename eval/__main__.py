"""`python -m eval`: the experiments (eval/cli/experiments.py)."""

from h2cache.eval.cli.experiments import main

if __name__ == "__main__":
    main()
