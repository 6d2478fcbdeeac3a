package plan

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"slices"
)

// digest is a hash of named values. Every value is preceded by its length, so
// that two different lists never hash alike.
type digest struct{ written []byte }

func (d *digest) add(values ...string) {
	d.written = binary.AppendUvarint(d.written, uint64(len(values)))
	for _, value := range values {
		d.written = binary.AppendUvarint(d.written, uint64(len(value)))
		d.written = append(d.written, value...)
	}
}

func (d *digest) sum() string {
	sum := sha256.Sum256(d.written)
	return hex.EncodeToString(sum[:])
}

// hashSet is a hash of certificates in which their order does not count.
func hashSet(certificates []*x509.Certificate) string {
	raw := make([][]byte, len(certificates))
	for i, certificate := range certificates {
		raw[i] = certificate.Raw
	}
	slices.SortFunc(raw, bytes.Compare)
	var d digest
	for _, der := range slices.CompactFunc(raw, bytes.Equal) {
		d.add(string(der))
	}
	return d.sum()
}
