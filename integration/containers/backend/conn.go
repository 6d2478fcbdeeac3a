package main

import (
	"context"
	"net"
	"net/http"
	"sync/atomic"
)

// connectionKey finds the number of requests of a connection in a request's
// context.
type connectionKey struct{}

func withConnectionCount(ctx context.Context, _ net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, new(atomic.Int64))
}

func connectionCount(r *http.Request) *atomic.Int64 {
	return r.Context().Value(connectionKey{}).(*atomic.Int64)
}
