"""The hot loop's three operations. Each file: the formula, a plain PyTorch reference, one public function."""
