"""`python -m hf_rlhf_ext` runs the command `hf-rlhf`. It also works in `accelerate launch -m hf_rlhf_ext ppo …`."""

from .cli.main import main

if __name__ == "__main__":
    main()
