"""Chapter 1: the smallest language model. It looks at one character and guesses the next.

    python bigram.py                                 # counts input.txt, learns it too, writes a sample and a picture

A bigram is a pair of neighbours. How often each pair occurs in a text is a square table, and that table, with each row
scaled to sum to 1, is a language model: row a says how probable each character is after an a. We find the same table
twice: by counting, and by gradient descent, the way in which every later chapter learns.

Shapes in the comments: B contexts, T tokens in each, V = vocab_size, the number of different characters.

Exercises:
- Count with ADD = 0.01, 1 and 100: which has the best val loss, and what would 0 risk?
- Start `learn` from random logits in place of zeros: does it end elsewhere?
Chapter 2, trigram.py, looks back two characters in place of one.
"""

from utils import UserError, option, parse_options, run_command  # first: Ctrl-C is quiet while PyTorch loads

# isort: split
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import load_data
from plots import bigram_table, save_picture
from tokenizer import prompt_tokens

ADD = 1.0  # every pair counts as seen this often before we begin, so that nothing is ever impossible (Laplace)
MOST_CHARS = 1000  # more rows than this take minutes to learn
MOST_LABELS = 80  # more rows than this make no readable picture


@dataclass
class BigramOptions:
    """Every flag of bigram.py: its type, its default and its line of help."""

    data: str = option("input.txt", "text file to count (UTF-8)")
    out: str = option("bigram.png", "file for the picture of the table (.png, .svg or .pdf)")
    steps: int = option(1000, "steps of gradient descent", at_least=0)
    max_new_tokens: int = option(300, "length of the sample in characters", at_least=0)
    seed: int = option(1337, "the same seed writes the same sample", at_least=0)


class Bigram:
    """A table of positive numbers (V, V), whose rows are scaled to sum to 1: how probable is b after a?"""

    def __init__(self, counts):
        counts = counts.double()
        self.probs = (counts / counts.sum(dim=1, keepdim=True)).float()  # (V, V)

    @classmethod
    def from_tokens(cls, tokens, vocab_size):
        """The model of a text, tokens (N,), by counting."""
        return cls(count_pairs(tokens, vocab_size) + ADD)

    def next_probs(self, context):
        """context: (B, T) int64, T >= 1; only the last token counts. Returns the next one's probabilities, (B, V)."""
        return self.probs[context[:, -1]]

    def val_loss(self, tokens):
        """Mean surprise -log p over tokens (M,), M >= 2, in nats per token. All but the first are targets."""
        tokens = tokens.long()
        return mean_surprise(self.probs[tokens[:-1], tokens[1:]])


def mean_surprise(probs):
    """Mean of -log p over the probabilities that a model gave to what really came next: the cross-entropy, in nats."""
    return -probs.double().log().mean().item()


def count_pairs(tokens, vocab_size):
    """How often is a followed by b? tokens (N,) -> (V, V) int64, row a, column b."""
    tokens = tokens.long()
    pairs = tokens[:-1] * vocab_size + tokens[1:]  # (N - 1,): each pair as one number, its cell in the flattened table
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)


def learn(counts, steps):
    """Gradient descent on a table of logits. counts (V, V), ADD included -> probabilities (V, V), rows sum to 1.

    The loss is the mean cross-entropy over all pairs of the text. Equal pairs have equal losses: we need each of them
    once, times its count, and so a step over the whole text costs no more than one over the table.

    In row a its gradient is (share of a in the text) * (softmax(logits)[a] - counts[a] / counts[a].sum()). It vanishes
    where prediction and count agree, and nowhere else: this is why learning must arrive where counting does.
    """
    share = counts.double() / counts.sum()  # (V, V), sums to 1
    logits = torch.zeros_like(share, requires_grad=True)  # all zeros: every character is as probable as any other
    optimizer = torch.optim.Adam([logits])  # sizes the step for each logit, so rare pairs learn as fast as common ones
    for step in range(steps):
        loss = -(share * F.log_softmax(logits, dim=1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1 - step / steps  # long strides at first, ever shorter ones to settle
        optimizer.step()
    return F.softmax(logits.detach(), dim=1)


def write(model, context, max_new_tokens, generator):
    """Continue context (1, T): ask for probabilities, draw a token, append it, again. Yields each token."""
    for _ in range(max_new_tokens):
        token = torch.multinomial(model.next_probs(context), 1, generator=generator)  # (1, 1)
        context = torch.cat([context[:, -1:], token], dim=1)  # two tokens: neither this model nor the next needs more
        yield token.item()


def report(data, model, options):
    """Print the val loss of the model and a sample of what it writes."""
    loss = model.val_loss(data.val)
    print(f"val loss {loss:.4f} nats per token ({data.bits_per_byte(loss):.3f} bits per byte)")
    generator = torch.Generator().manual_seed(options.seed)
    ids = write(model, prompt_tokens(data.tokenizer, ""), options.max_new_tokens, generator)
    print(f"a sample:\n{data.tokenizer.decode(ids)}\n")


def main(argv):
    options, _ = parse_options(BigramOptions, argv, "Chapter 1: count which character follows which.")
    data = load_data(options.data, "chars")
    V = data.tokenizer.vocab_size
    if V > MOST_CHARS:
        raise UserError(f"--data {options.data}: has {V} different characters, too many for a table; use train.py")
    print(f"counting {len(data.train) - 1:,} pairs of {V} characters (a blind guess has a loss of {math.log(V):.4f})")
    counts = count_pairs(data.train, V) + ADD
    counted, learned = Bigram(counts), Bigram(learn(counts, options.steps))
    for name, model in (("counting", counted), (f"{options.steps} steps of gradient descent", learned)):
        print(f"by {name}: train loss {model.val_loss(data.train):.4f}, val loss {model.val_loss(data.val):.4f}")
    print(f"largest difference between their probabilities: {(counted.probs - learned.probs).abs().max():.1e}")
    report(data, counted, options)
    common = counts.sum(dim=1).topk(min(V, MOST_LABELS)).indices.sort().values
    labels = [data.tokenizer.chars[i] for i in common]
    save_picture(bigram_table(counted.probs[common][:, common], labels), options.out)
    return 0


if __name__ == "__main__":
    run_command(main)
