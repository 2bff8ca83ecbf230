"""Axis letters used in array names, annotations and einsums, and the words of the engine.

B  rows in a step (one per scheduled sequence)   T  packed query tokens
R  rows of logits in a step                      A  slots, the last one the null slot
M  page-table width (pages per slot)             P  pages in the pool
Z  tokens per page                               S  key/value positions
D  hidden size    F  intermediate size           V  vocabulary
N  query heads    K  key/value heads             G  query heads per kv head
H  head dimension L  layers                      E  experts
Q  query heads side by side, N * H    C  kv heads side by side, K * H
U  query, key and value heads side by side, Q + 2 C; on several chips, those of each chip
Y  gate and up features side by side, 2 F, likewise
W  32-bit words of a vocabulary mask, ceil(V / 32)
X  blocks of 128 tokens of a vocabulary
J  entries of a short per-slot or per-step list, padded (stop ids, biases, top logprobs)

An array's name ends in its axes: `q_TNH`, `page_table_AM`. Numbers stand for themselves:
`pages_LPKZ2H` keeps a token's key and value side by side in its last axis of width 2H.

Glossary:

request      one prompt with its sampling parameters; it asks for n completions
completion   one of the n outputs of a request: its text, and why it ended
sequence     the tokens of one completion, prompt included, as the scheduler sees them
slot         a place in SlotState: up to max_num_seqs sequences run at once, one in each
null slot    the slot behind the last; padding rows use it, and nobody reads it
page         KV cache of Z consecutive tokens, for all layers
null page    page 0; padding is written there, and nobody reads it
pool         all pages on the device
cell         page_id * Z + offset: the place of one token in the pool
position     place of a token in its sequence, 0-based
row          a place in the batch of one step, used by one sequence
logits index which of the step's T tokens a row of logits belongs to
chunk        the consecutive tokens of one sequence that one step computes
step         one forward pass of the model
dispatch     one call of a compiled program: one step, or several decode steps
bucket       a size that programs are compiled for; smaller batches are padded to it
sample       choose the next token
score        compute the logprob of a token that is given, such as one of a prompt
publish      tell the prefix cache the content of a full page
preempt      take the slot and pages of a running sequence, which starts again later
"""

from typing import NewType

PageId = NewType("PageId", int)  # which page of the pool, 0 <= id < P; page 0 is the null page
Slot = NewType("Slot", int)  # a place in SlotState, 0 <= slot < max_slots
