//go:build !linux

package link

import (
	"context"
	"net"
)

// dialTCP connects to a replica.
func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}
