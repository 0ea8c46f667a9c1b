"""Fixed-point formats of the prior (`docs/entropy-coder.md`)."""

#: Features are symbols clipped to +-LINEAR_MAX, and companded magnitudes.
LINEAR_MAX = 127
#: Input features are integers in units of 2^-INPUT_BITS, hidden ones in units of 2^-HIDDEN_BITS.
INPUT_BITS, HIDDEN_BITS = 3, 4
HIDDEN_MAX = 255
#: Hidden features less this have 8 bits and a sign.
HIDDEN_OFFSET = 128
#: Last layer: scale index = 32 + 2^SCALE_BITS o, mean = o.
SCALE_BITS = 3
#: Weights of the direct prediction are integers in units of 2^-DIRECT_BITS.
DIRECT_BITS = 6
#: Least and largest shift of each layer. Devices differ for shifts by a negative number or by more than 31 bits.
SHIFTS = {"first": (1, 14), "second": (1, 14), "out": (2, 8)}
#: Bounds of a bias.
PRIOR_BIAS_MAX = 2**22
#: Entries of the table of companded magnitudes.
COMPANDED = 32769
