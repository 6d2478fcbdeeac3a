package edge

import (
	"context"

	"github.com/reseal/reseal/edge/backend"
	"github.com/reseal/reseal/edge/session"
)

// sessions is the store as the backend leg sees it.
type sessions struct{ *session.Store }

// Reserve implements backend.Handshaker.
func (s sessions) Reserve(ctx context.Context, identity string, terms backend.Terms) (backend.Attempt, error) {
	return s.Store.Reserve(ctx, identity, session.Terms(terms))
}
