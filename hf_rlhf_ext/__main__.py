"""`python -m hf_rlhf_ext`: the command `hf-rlhf`, also for `accelerate launch -m hf_rlhf_ext ppo …`."""

from .cli.main import main

if __name__ == "__main__":
    main()
