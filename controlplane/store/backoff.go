package store

import (
	"context"
	"math/rand/v2"
	"time"
)

// backoff is a wait that doubles up to a limit, with jitter so that replicas
// don't move in step.
type backoff struct {
	first, limit, next time.Duration
}

func newBackoff(first, limit time.Duration) *backoff {
	return &backoff{first: first, limit: limit, next: first}
}

func (b *backoff) reset() { b.next = b.first }

// sleep waits, but not beyond the end of ctx.
func (b *backoff) sleep(ctx context.Context) {
	timer := time.NewTimer(b.next/2 + rand.N(b.next/2+1))
	defer timer.Stop()
	b.next = min(2*b.next, b.limit)
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
