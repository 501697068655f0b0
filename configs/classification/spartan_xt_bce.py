# SpaRTAN-XT at 256 x 256 with a binary cross entropy for each class, in the manner of "ResNet
# strikes back" (arXiv 2110.00476); targets keep their shares. Not in the paper, not measured.
_base_ = ['./_base_/spartan.py', './_base_/imagenet_256.py', './_base_/schedule_300e.py']

model = dict(head=dict(loss=dict(
    # The mean over the 1000 classes.
    _delete_=True, type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1e-3)))
