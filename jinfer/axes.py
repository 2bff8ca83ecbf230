"""Axis letters used in array names, annotations and einsums.

B  rows in a step (one per scheduled sequence)   T  packed query tokens
R  readouts of a step (places that want logits)  A  slots, the last one the bin
M  page-table width (pages per slot)             P  pages in the pool
Z  tokens per page                               S  key/value positions
D  model width    F  feed-forward width          V  vocabulary
N  query heads    K  key/value heads             G  query heads per kv head
H  head width     L  layers                      E  experts
Q  query heads side by side, N * H    C  kv heads side by side, K * H
U  query, key and value heads side by side, Q + 2 C, on several chips each one's own
Y  gate and up features side by side, 2 F, likewise
W  32-bit words of a vocabulary mask, ceil(V / 32)
X  blocks of 128 tokens of a vocabulary
J  entries of a short per-slot or per-step list, padded (stop ids, biases, top logprobs)

An array's name ends in its axes: `q_TNH`, `page_table_AM`. Numbers stand for themselves:
`pages_LPKZ2H` keeps a token's key and value side by side in its last axis of width 2H.
"""

from typing import NewType

PageId = NewType("PageId", int)  # which page of the pool, 0 <= id < P; page 0 is the bin
Slot = NewType("Slot", int)  # a place in SlotState, 0 <= slot < max_slots
Position = NewType("Position", int)  # place in one sequence, 0-based
Cell = NewType("Cell", int)  # page_id * Z + offset: one token's home in the pool
