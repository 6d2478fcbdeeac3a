package trust

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// closeDelay is how long a revoked caller's connections stay, so that its streams
	// end with the reason first. All of it is well below a second.
	closeDelay = 200 * time.Millisecond
	// refusalTime is how long a connection may be used to hear that its certificate
	// was revoked.
	refusalTime = 5 * time.Second
)

// live are the connections and streams of callers with a certificate, so that they
// can be ended.
type live struct {
	mu   sync.Mutex
	held map[Identity]map[*holding]struct{}
}

// holding is a connection or a stream.
type holding struct {
	who caller
	// end ends it, for that reason. It does not block.
	end func(why error)
}

// add enters h until remove is called.
func (l *live) add(h *holding) (remove func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = map[Identity]map[*holding]struct{}{}
	}
	of := l.held[h.who.identity]
	if of == nil {
		of = map[*holding]struct{}{}
		l.held[h.who.identity] = of
	}
	of[h] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(of, h)
		if len(of) == 0 {
			delete(l.held, h.who.identity)
		}
	}
}

func (l *live) of(who Identity) []*holding {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []*holding
	for h := range l.held[who] {
		found = append(found, h)
	}
	return found
}

// enforce ends what the revoked of some identities have open here, and tells who
// else has to know.
func (t *Trust) enforce(identities []Identity) {
	for _, of := range identities {
		ended := 0
		for _, h := range t.live.of(of) {
			if err := t.refused(h.who); err != nil {
				h.end(err)
				ended++
			}
		}
		t.logger.Info("a revocation is in force", "identity", of.String(), "ended", ended)
		if _, known := t.registry.enrolment(of); !known && t.revoked != nil {
			t.revoked(of)
		}
	}
}

// bounded makes the context of a stream end when its caller is revoked. The caller
// calls end when the stream has ended, with its error, and returns what that says.
func (t *Trust) bounded(ctx context.Context) (context.Context, func(error) error) {
	who, err := callerOf(ctx)
	if err != nil || who.certificate == nil {
		return ctx, func(err error) error { return err }
	}
	ctx, cancel := context.WithCancelCause(ctx)
	remove := t.live.add(&holding{who: who, end: cancel})
	// It may have been revoked between the check and now.
	if err := t.refused(who); err != nil {
		cancel(err)
	}
	return ctx, func(err error) error {
		remove()
		defer cancel(nil)
		if why := t.refused(who); why != nil {
			return why
		}
		return err
	}
}

// newlyRevoked are the identities that a list of revocations has more than another,
// or anew.
func newlyRevoked(before, after map[Identity]revocation) []Identity {
	var found []Identity
	for of, entry := range after {
		if held, ok := before[of]; !ok || !held.At.Equal(entry.At) {
			found = append(found, of)
		}
	}
	slices.SortFunc(found, func(a, b Identity) int { return strings.Compare(a.String(), b.String()) })
	return found
}
