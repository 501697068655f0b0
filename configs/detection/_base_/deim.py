# What DEIM trains with, for leaves to use: the loss of the classes, the learning rate, the groups
# of parameters, and the form that its RT-DETRs have.
mal = dict(_delete_=True, type='MatchabilityAwareLoss', gamma=1.5)

# A leaf says how many epochs are flat, and how many the tail has. Officially the warm-up takes 2000
# iterations, which may be all that a small dataset has; ECDet's takes three epochs at most.
flat_cosine = dict(type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, warmup=3,
                   max_warmup=2000, gamma=0.5)

# Norms don't decay, and have the full learning rate in the backbone, too; biases decay. The second
# rule's factor is the leaf's.
norms = dict(norm=True, decay_mult=0.)

# DEIM-RT-DETRv2 has other activations and a deeper query position, at the same cost: weights of
# RT-DETR don't fit.
deim_decoder = dict(act='silu', query_pos_layers=3)
