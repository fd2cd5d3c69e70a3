"""Who somebody is: keys, signatures, certificates and the roster that names them."""
