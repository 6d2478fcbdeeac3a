package share

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxSkew is how far an offer's time may be from this edge's clock: the time of
	// transit, and the difference of the clocks.
	maxSkew = 5 * time.Minute
	// maxReplays bounds the offers of one origin that are remembered for as long,
	// maxOrigins the origins.
	maxReplays = 32768
	maxOrigins = maxPeers
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
	identity := exchange.Identity(offer.GetIdentity())
	if identity.Group() != pool.Group {
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
	if err := s.replays.take(offer.GetOrigin(), [sha256.Size]byte(sum), now); err != nil {
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

// replays remembers the offers of each origin for as long as they would be taken
// again. An origin that sends too many is refused, and nobody else: edges are known
// by their certificates, so none can fill what is another's.
type replays struct {
	mu      sync.Mutex
	origins map[string]*seen
}

// seen is what came of one origin, in two parts that take turns: forgetting costs
// nothing per offer.
type seen struct {
	newer, older map[[sha256.Size]byte]bool
	turned       time.Time
}

// replayWindow is for how long an offer may be taken: its time may be off by maxSkew
// to either side.
const replayWindow = 2 * maxSkew

func (r *replays) take(origin string, sum [sha256.Size]byte, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.origins[origin]
	if from == nil {
		if len(r.origins) >= maxOrigins {
			r.forgetLocked(now)
		}
		if len(r.origins) >= maxOrigins {
			return fmt.Errorf("offers of more than %d edges in %v", maxOrigins, replayWindow)
		}
		from = &seen{newer: map[[sha256.Size]byte]bool{}, turned: now}
		r.origins[origin] = from
	}
	from.turn(now)
	switch {
	case from.newer[sum] || from.older[sum]:
		return errors.New("it came before")
	case len(from.newer)+len(from.older) >= maxReplays:
		return fmt.Errorf("more than %d offers of this edge in %v", maxReplays, replayWindow)
	}
	from.newer[sum] = true
	return nil
}

// turn forgets what is older than replayWindow; some of it is remembered for up to
// twice as long.
func (s *seen) turn(now time.Time) {
	switch age := now.Sub(s.turned); {
	case age >= 2*replayWindow:
		s.newer, s.older, s.turned = map[[sha256.Size]byte]bool{}, nil, now
	case age >= replayWindow:
		s.newer, s.older, s.turned = map[[sha256.Size]byte]bool{}, s.newer, now
	}
}

// forgetLocked drops origins from which nothing has come for a long time.
func (r *replays) forgetLocked(now time.Time) {
	maps.DeleteFunc(r.origins, func(_ string, from *seen) bool { return now.Sub(from.turned) >= 2*replayWindow })
}
