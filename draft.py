"""A cheap guess of how a text goes on: what most often came after its last few tokens (chapter 2 meets chapter 5).

    draft = Draft.from_tokens(data.train)
    draft.propose([20, 43, 50], 4)        # up to 4 tokens that may follow

generate.speculate lets the model check such guesses, several in one pass. trigram.py mixes what long and short contexts
say; here a guess must be quick, so the longest context that the text had more than once speaks alone.
"""

import os

import torch

from utils import UserError, write_atomically

ORDERS = (5, 4, 3, 2)  # how many tokens a context has; with 2 it is the trigram of chapter 2
SURE = 0.4  # how often the guess must have been right in the text
MOST_TOKENS = 1_000_000  # of a longer text, the first million tell enough
FACTOR = 0x9E3779B97F4A7C15 - 2**64  # an odd number without pattern, as the int64 that it is
FILE = "draft.safetensors"


class Draft:
    """tables: for each of ORDERS a dict, from the hash of a context to the token that most often followed it.

    Contexts are known by a 64-bit hash alone. Should two share one, a guess is worse, and nothing else.
    """

    def __init__(self, tables):
        self.tables = tables

    @classmethod
    def from_tokens(cls, tokens):
        """Count what follows what in a text, tokens (N,)."""
        tokens = tokens[:MOST_TOKENS].long()
        return cls([dict(zip(*(t.tolist() for t in most_frequent(tokens, n)))) for n in ORDERS])

    def propose(self, tokens, n):
        """Up to n tokens that may follow the list `tokens`; fewer where the text has nothing like it."""
        context, guesses = list(tokens[-max(ORDERS) :]), []
        while len(guesses) < n:
            for order, table in zip(ORDERS, self.tables):
                guess = table.get(hash_of(context[-order:])) if len(context) >= order else None
                if guess is not None:
                    break
            else:
                break
            guesses.append(guess)
            context.append(guess)
        return guesses

    def save(self, directory):
        """Write draft.safetensors."""
        from safetensors.torch import save

        content = {}
        for order, table in zip(ORDERS, self.tables):
            content[f"contexts.{order}"] = torch.tensor(list(table), dtype=torch.int64)
            content[f"tokens.{order}"] = torch.tensor(list(table.values()), dtype=torch.int32)

        def write(path):
            with open(path, "wb") as f:
                f.write(save(content))

        write_atomically(os.path.join(directory, FILE), write)

    @classmethod
    def load(cls, directory, vocab_size):
        """The draft saved in a directory; None where there is none. Raises UserError where it is damaged, or guesses
        tokens that the model does not have."""
        from safetensors.torch import load_file

        path = os.path.join(directory, FILE)
        if not os.path.isfile(path):
            return None
        try:
            content = load_file(path)
            parts = [(content[f"contexts.{n}"].tolist(), content[f"tokens.{n}"].long().tolist()) for n in ORDERS]
            if not all(token in range(vocab_size) for _, tokens in parts for token in set(tokens)):
                raise ValueError("it is of another model")
        except Exception as error:  # safetensors has a kind of its own for each fault
            raise UserError(f"{path}: is damaged ({error}); delete it, writing goes on without guesses") from None
        return cls([dict(zip(*part)) for part in parts])


def hash_of(context):
    """A list of tokens as one int64: a polynomial in FACTOR, whose overflow wraps around as in tensors."""
    code = 0
    for token in context:
        code = code * FACTOR + token + 1
    return (code + 2**63) % 2**64 - 2**63


def most_frequent(tokens, order):
    """The contexts of `order` tokens that the text (N,) most often, and more than once, goes on from in the same way.

    Returns their hashes (n,) int64 and the token that follows (n,) int64. Contexts in which the most frequent token has
    less than SURE of the cases are left out: there a guess would mostly be wrong.
    """
    if len(tokens) <= order:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    codes = torch.zeros(len(tokens) - order, dtype=torch.int64)
    for i in range(order):
        codes = codes * FACTOR + tokens[i : i + len(codes)] + 1
    # Sorted by context, and within a context by what follows, equal pairs are neighbours: count the length of each run.
    following, by_token = tokens[order:].sort(stable=True)
    codes, by_code = codes[by_token].sort(stable=True)
    following = following[by_code]
    new = torch.ones(len(codes), dtype=torch.bool)
    new[1:] = (codes[1:] != codes[:-1]) | (following[1:] != following[:-1])
    first = new.nonzero().squeeze(1)
    counts = torch.diff(first, append=torch.tensor([len(codes)]))
    codes, following = codes[first], following[first]
    _, context = codes.unique_consecutive(return_inverse=True)
    sure = counts >= SURE * torch.bincount(context, counts)[context]
    # Sorted by count, and then by context, the last run of each context is its most frequent one.
    counts, by_count = counts.sort(stable=True)
    codes, by_code = codes[by_count].sort(stable=True)
    following, sure, counts = following[by_count][by_code], sure[by_count][by_code], counts[by_code]
    last = torch.ones(len(codes), dtype=torch.bool)
    last[:-1] = codes[1:] != codes[:-1]
    last &= (counts > 1) & sure
    return codes[last], following[last]
