# The same at 256 x 256.
_base_ = './imagenet_224.py'

train_pipeline = _base_.train_pipeline
train_pipeline[1].transforms[0].size = 256
test_pipeline = _base_.test_pipeline
test_pipeline[1].transforms[0].size = 256
test_pipeline[1].transforms[1].size = 256

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
