package edge

import (
	"context"
	"net/http"

	"github.com/reseal/reseal/edge/backend"
	"github.com/reseal/reseal/edge/frontend"
	"github.com/reseal/reseal/edge/session"
)

// sessions is the store as the backend leg sees it.
type sessions struct{ *session.Store }

// Reserve implements backend.Handshaker.
func (s sessions) Reserve(ctx context.Context, identity string, terms backend.Terms) (backend.Attempt, error) {
	return s.Store.Reserve(ctx, identity, session.Terms(terms))
}

// upstream is the boundary of the two legs: the frontend's exchange is the
// backend's call.
type upstream struct{ pools *backend.Backend }

// RoundTrip implements frontend.Upstream.
func (u upstream) RoundTrip(req *http.Request, x *frontend.Exchange) (*http.Response, error) {
	call := backend.Call(*x)
	response, err := u.pools.RoundTrip(req, &call)
	*x = frontend.Exchange(call)
	return response, err
}

// Tunnel implements frontend.Upstream.
func (u upstream) Tunnel(ctx context.Context, x *frontend.Exchange) (frontend.Tunnel, error) {
	call := backend.Call(*x)
	tunnel, err := u.pools.Tunnel(ctx, &call)
	*x = frontend.Exchange(call)
	if err != nil {
		return nil, err
	}
	return tunnel, nil
}
