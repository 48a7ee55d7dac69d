"""Chapter 2: look back two characters in place of one, and mix what three tables say.

    python trigram.py                                # counts input.txt, fits the mix, writes a sample and a picture

Two characters tell more about the next than one, but there are V times as many contexts, and most are rare: a pair that
was seen once is not to be trusted alone, one that was never seen says nothing. So three voices are mixed,

    P(c after ab) = w1 * count(c) / N  +  w2 * count(bc) / count(b)  +  w3 * count(abc) / count(ab)

with weights that depend on how often the text has "ab" (Jelinek & Mercer 1980, interpolation). They cannot be fitted on
the text that was counted: there the third voice has seen every answer. So we hold out the last tenth of the training
text, find the weights that make it most probable, then count again with all of it. The val split has no part in this.

Shapes in the comments: B contexts, T tokens in each, V = vocab_size, K = BUCKETS rows of weights.

Exercises:
- Fit the weights on the counted text itself: where does w3 go, and what becomes of the val loss?
- Add a fourth voice that looks back three characters. How large does its table grow?
Chapter 3, model.py, looks back hundreds of characters: it shares what it learns between contexts that are alike, where
a table must see each one by itself.
"""

from utils import UserError, option, parse_options, run_command  # first: Ctrl-C is quiet while PyTorch loads

# isort: split
from dataclasses import dataclass

import torch

from bigram import ADD, Bigram, mean_surprise, report
from data import load_data
from plots import mixing_weights, save_picture

BUCKETS = 20  # pairs seen 0 times, once, 2-3, 4-7, 8-15 times, ... have weights of their own
ITERATIONS = 100  # by then the weights stand still in the third decimal
MOST_CHARS = 300  # a table of 300 x 300 x 300 takes half a gigabyte to make


@dataclass
class TrigramOptions:
    """Every flag of trigram.py: its type, its default and its line of help."""

    data: str = option("input.txt", "text file to count (UTF-8)")
    out: str = option("trigram.png", "file for the picture of the weights (.png, .svg or .pdf)")
    max_new_tokens: int = option(300, "length of the sample in characters", at_least=0)
    seed: int = option(1337, "the same seed writes the same sample", at_least=0)


class Trigram:
    """Three voices, mixed once and for all into a table probs (V, V, V): how probable is c after ab?"""

    def __init__(self, voices, seen, weights):
        """voices, seen: what `count_voices` returns; weights (K, 3), rows sum to 1."""
        self.unigram, self.bigram, _ = voices
        self.seen, self.weights = seen, weights
        mix = weights.float()[bucket(seen)]  # (V, V, 3): the weights of each pair ab
        self.probs = sum(mix[:, :, i, None] * voice for i, voice in enumerate(voices))  # broadcast to (V, V, V)

    @classmethod
    def from_tokens(cls, tokens, vocab_size):
        """The model of a text, tokens (N,). Raises UserError where the vocabulary is too large for a table."""
        if vocab_size > MOST_CHARS:
            raise UserError(
                f"has {vocab_size} different characters, too many for a table of triples; give a text with at most "
                f"{MOST_CHARS}, or use train.py"
            )
        cut = len(tokens) - len(tokens) // 10
        voices, seen = count_voices(tokens[:cut], vocab_size)
        a, b, c = triples(tokens[max(0, cut - 2) :])  # each (M,): the held-out c, the first with what came before it
        said = torch.stack([voices[0][c], voices[1][b, c], voices[2][a, b, c]], dim=1)  # (M, 3)
        buckets = bucket(seen[a, b])
        weights, _ = fit_weights(said, buckets)
        for k in range(1, BUCKETS):  # none of the tokens was in it: as in that of pairs seen less often
            if not (buckets == k).any():
                weights[k] = weights[k - 1]
        return cls(*count_voices(tokens, vocab_size), weights)

    def next_probs(self, context):
        """context: (B, T) int64; its last two tokens count, or, where T = 1, the one there is. Returns (B, V)."""
        if context.size(1) == 1:
            return self.bigram[context[:, 0]]
        return self.probs[context[:, -2], context[:, -1]]

    def val_loss(self, tokens):
        """Mean surprise -log p over tokens (M,), M >= 2, in nats per token. All but the first are targets."""
        a, b, c = triples(tokens)
        first, second = tokens[:2].long()
        return mean_surprise(torch.cat([self.bigram[first, second][None], self.probs[a, b, c]]))


def triples(tokens):
    """Every three neighbours: tokens (N,) -> a, b, c, each (N - 2,) int64."""
    tokens = tokens.long()
    return tokens[:-2], tokens[1:-1], tokens[2:]


def count_triples(tokens, vocab_size):
    """How often is ab followed by c? tokens (N,) -> (V, V, V) int64."""
    a, b, c = triples(tokens)
    cells = (a * vocab_size + b) * vocab_size + c
    return torch.bincount(cells, minlength=vocab_size**3).view(vocab_size, vocab_size, vocab_size)


def count_voices(tokens, vocab_size):
    """What each table says, and how often each pair was seen: ([P(c) (V,), P(c|b) (V, V), P(c|ab) (V, V, V)], (V, V)).

    The first two are smoothed as in chapter 1. After a pair that was never seen, the third finds all equally likely.
    """
    singles = torch.bincount(tokens.long(), minlength=vocab_size) + ADD
    unigram = singles / singles.sum()
    bigram = Bigram.from_tokens(tokens, vocab_size).probs
    counts = count_triples(tokens, vocab_size)
    seen = counts.sum(dim=2)
    trigram = torch.where(seen[:, :, None] > 0, counts / seen[:, :, None], 1 / vocab_size)
    return [unigram, bigram, trigram], seen


def bucket(seen):
    """Which row of the weights a pair uses that was seen so often: 0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3, ..."""
    return torch.frexp(seen.double()).exponent.clamp(max=BUCKETS - 1).long()  # how many binary digits the count has


def fit_weights(said, buckets):
    """The weights under which M held-out tokens are most probable, by expectation maximisation (Dempster et al. 1977).

    said: (M, 3), the probability that each voice gave to the token that came; buckets: (M,), the row of its weights.
    Suppose that each token was written by one of the voices, drawn by weight. E-step: given that it came, which voice
    was it, with what probability? M-step: a voice's new weight is its share of the tokens. Each iteration makes the
    tokens more probable, until nothing changes. As in chapter 1 we begin with one more token for each cell, so that no
    weight is ever 0.

    Returns weights (K, 3) and the log-probability before each iteration, of the tokens and those added, in nats.
    """
    weights = torch.full((BUCKETS, 3), 1 / 3, dtype=torch.float64)
    history = []
    for _ in range(ITERATIONS):
        joint = weights[buckets] * said  # (M, 3): the voice was drawn and wrote the token
        total = joint.sum(dim=1, keepdim=True)  # (M, 1): some voice wrote it
        history.append((total.log().sum() + weights.log().sum()).item())
        votes = torch.ones_like(weights).index_add(0, buckets, joint / total)  # (K, 3)
        weights = votes / votes.sum(dim=1, keepdim=True)
    return weights, history


def main(argv):
    options, _ = parse_options(TrigramOptions, argv, "Chapter 2: count which character follows which two.")
    data = load_data(options.data, "chars")
    V = data.tokenizer.vocab_size
    try:
        model = Trigram.from_tokens(data.train, V)
    except UserError as error:
        raise UserError(f"--data {options.data}: {error}") from None
    print(f"counted {len(data.train) - 2:,} triples of {V} characters, fitted weights on the last tenth of them")

    used = bucket(model.seen).unique().tolist()
    names = ["0", "1"] + [f"{2 ** (k - 1)}-{2**k - 1}" for k in range(2, BUCKETS - 1)] + [f"{2 ** (BUCKETS - 2)}+"]
    print(f"{'pair seen':>15}  P(c)   P(c|b)  P(c|ab)")
    for k in used:
        print(f"{names[k]:>15}  " + "   ".join(f"{w:.3f}" for w in model.weights[k]))
    print(f"unigram: val loss {mean_surprise(model.unigram[data.val[1:].long()]):.4f}")
    print(f"bigram:  val loss {Bigram(model.bigram).val_loss(data.val):.4f}")
    print("trigram: ", end="")
    report(data, model, options)
    save_picture(mixing_weights(model.weights[used], [names[k] for k in used]), options.out)
    return 0


if __name__ == "__main__":
    run_command(main)
