package share

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// What is signed and what is sealed begin differently, so that neither can be
// taken for the other, or for what the key is used for in TLS.
const (
	sealLabel = "reseal.v1 session offer\x00"
	signLabel = "reseal.v1 session offer signature\x00"
)

var (
	errSignature = errors.New("the signature is not the origin's")
	errSealed    = errors.New("it does not open")
)

// header is the part of an offer that the seal and the signature bind.
func header(offer *resealv1.SessionOffer) []byte {
	var out []byte
	for _, field := range []string{
		offer.GetOrigin(), offer.GetRecipient(), offer.GetRecipientBootId(), offer.GetPool(), offer.GetIdentity(),
	} {
		out = binary.BigEndian.AppendUint32(out, uint32(len(field)))
		out = append(out, field...)
	}
	return binary.BigEndian.AppendUint64(out, uint64(offer.GetTime().AsTime().UnixMilli()))
}

// seal fills in the rest of an offer: time, ciphertext, certificate, signature.
// to is the key of the recipient's certificate.
func seal(offer *resealv1.SessionOffer, plaintext []byte, to *ecdsa.PublicKey, certificate *x509.Certificate, key *ecdsa.PrivateKey) error {
	public, err := to.ECDH()
	if err != nil {
		return err
	}
	recipient, err := hpke.NewDHKEMPublicKey(public)
	if err != nil {
		return err
	}
	offer.Time = timestamppb.New(time.Now().Truncate(time.Millisecond))
	offer.Ciphertext, err = hpke.Seal(recipient, hpke.HKDFSHA256(), hpke.AES256GCM(), sealInfo(offer), plaintext)
	if err != nil {
		return err
	}
	offer.Certificate = certificate.Raw
	offer.Signature, err = ecdsa.SignASN1(rand.Reader, key, digest(offer))
	return err
}

// open returns what a verified offer holds.
func open(offer *resealv1.SessionOffer, key *ecdsa.PrivateKey) ([]byte, error) {
	private, err := key.ECDH()
	if err != nil {
		return nil, err
	}
	recipient, err := hpke.NewDHKEMPrivateKey(private)
	if err != nil {
		return nil, err
	}
	plaintext, err := hpke.Open(recipient, hpke.HKDFSHA256(), hpke.AES256GCM(), sealInfo(offer), offer.GetCiphertext())
	if err != nil {
		return nil, errSealed
	}
	return plaintext, nil
}

func sealInfo(offer *resealv1.SessionOffer) []byte {
	return slices.Concat([]byte(sealLabel), header(offer))
}

// digest is what the signature is over.
func digest(offer *resealv1.SessionOffer) []byte {
	sum := sha256.Sum256(slices.Concat([]byte(signLabel), header(offer), offer.GetCiphertext()))
	return sum[:]
}
