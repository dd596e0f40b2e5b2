"""The page of `ebm-prior demo` as a Space of the Hugging Face Hub."""

import os

import ebm_prior.demo

# Hub ids of heads that were pushed --with-backbone, as a variable of the Space
heads = os.environ.get("HEADS", "user/name").split()
demo = ebm_prior.demo.page({name: ebm_prior.demo.load(name) for name in heads})

if __name__ == "__main__":
    demo.launch()
