package feed

import (
	"context"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxObserving bounds the orders that are followed at the same time.
const maxObserving = 16

// observe follows an order, beside whatever else is going on, until the session ends at
// the latest.
func (s *session) observe(ctx context.Context, order *resealv1.ObserveOrder) {
	if s.feed.config.Observe == nil {
		return
	}
	if s.observing.Add(1) > maxObserving {
		s.observing.Add(-1)
		return
	}
	s.group.Go(func() error {
		defer s.observing.Add(-1)
		err := exchange.Guard("requests were observed", func() error { return s.feed.config.Observe(ctx, order) })
		s.feed.config.Logger.Debug("requests are no longer observed", "reason", err)
		return nil // an observation ends no feed
	})
}
