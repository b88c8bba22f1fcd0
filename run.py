"""Draw an image or a video with a cache: `python run.py prompt="a cat" method.tau1=0.1 seed=3 out=cat.png`.

The command line is eval/cli/generate.py, which `h2cache generate` is too.
"""

from h2cache.eval.cli.generate import main

if __name__ == "__main__":
    main()
