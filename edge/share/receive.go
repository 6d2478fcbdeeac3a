package share

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxSkew is how far an offer's time may be from this edge's clock: what
	// the way takes, and the difference of the clocks.
	maxSkew = 5 * time.Minute
	// maxReplays bounds the offers that are remembered for as long.
	maxReplays = 65536
)

// accept checks an offer as the contract says, the cheap things first, and takes
// in what it holds.
func (s *Share) accept(offer *resealv1.SessionOffer, keys []credentials) error {
	if offer.GetRecipient() != s.cfg.Edge || offer.GetRecipientBootId() != s.cfg.BootID || offer.GetOrigin() == s.cfg.Edge {
		return errors.New("it is for another edge")
	}
	pool, ok := s.pool(offer.GetPool())
	if !ok {
		return errors.New("the pool is not shared here")
	}
	identity := offer.GetIdentity()
	if group, _, _ := strings.Cut(identity, "|"); group != pool.Group {
		return errors.New("it is of another pool, or of an older or newer configuration of it")
	}
	now := time.Now()
	sealed := offer.GetTime().AsTime()
	if offer.GetTime() == nil || now.Sub(sealed).Abs() > maxSkew {
		return errors.New("it is too old, or the clocks of the edges differ")
	}
	cfg := pool.TLS(identity)
	if cfg == nil {
		return errors.New("nothing in this edge's plan leads to its identity")
	}
	newest := keys[0]
	key, err := s.trust.verify(offer.GetOrigin(), offer.GetCertificate(), newest.certificate, newest.roots)
	if err != nil {
		return err
	}
	sum := digest(offer)
	if !ecdsa.VerifyASN1(key, sum, offer.GetSignature()) {
		return errSignature
	}
	if err := s.replays.take([sha256.Size]byte(sum), sealed.Add(maxSkew), now); err != nil {
		return err
	}
	plaintext, err := openAny(offer, keys)
	if err != nil {
		return err
	}
	defer clear(plaintext)
	return s.cfg.Sessions.Adopt(identity, offer.GetOrigin(), plaintext, cfg)
}

// openAny also tries the key before the last renewal: the origin may not have
// heard of the new one when it sealed.
func openAny(offer *resealv1.SessionOffer, keys []credentials) (plaintext []byte, err error) {
	for _, held := range keys {
		if plaintext, err = open(offer, held.key); err == nil {
			return plaintext, nil
		}
	}
	return nil, err
}

// replays remembers offers for as long as they would be taken again.
type replays struct {
	mu   sync.Mutex
	seen map[[sha256.Size]byte]time.Time
}

func (r *replays) take(sum [sha256.Size]byte, until, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.seen[sum]; ok {
		return errors.New("it came before")
	}
	if len(r.seen) >= maxReplays {
		for old, end := range r.seen {
			if now.After(end) {
				delete(r.seen, old)
			}
		}
	}
	if len(r.seen) >= maxReplays {
		return fmt.Errorf("more than %d offers in %v", maxReplays, 2*maxSkew)
	}
	r.seen[sum] = until
	return nil
}
