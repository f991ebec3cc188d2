"""From folders to batches: sources and splits, the decode-once store, keyed views.

`source` finds the images and splits them, `store` decodes each once for all trials of a machine,
`views` draws the augmented versions and puts batches on the device.
"""
