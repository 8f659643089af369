"""What a trained model does token by token: sampling, beam search, streams of frames."""
