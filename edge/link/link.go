// Package link is an edge's way to the control plane: how replicas are
// dialled, and when a stream that broke is tried again.
package link

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver/manual"
)

const (
	// MaxMessage bounds a message from the control plane, in bytes.
	MaxMessage = 64 << 20
	// writeBuffer bounds a TLS record that an edge sends, in bytes. The control plane
	// keeps room for the largest, for each edge, for as long as the connection lives.
	writeBuffer = 4 << 10
	// connectTimeout is how long a replica may take to serve a connection. One that
	// has just started gives each of a fleet's handshakes its turn: an edge that gave
	// up soon would have it do the work again. Another address is tried meanwhile.
	connectTimeout = 30 * time.Second
)

// Config is what Dial needs.
type Config struct {
	// Addresses of the control plane's replicas, host:port. Required.
	Addresses []string
	// Shuffled spreads edges over the replicas. Default: the first that answers.
	Shuffled bool
	// Credentials secure the connection. Required.
	Credentials credentials.TransportCredentials
	// Dial makes the TCP connection. Default: net.Dialer.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Mover moves the connection to another replica when it is asked to. Nil: it
	// stays.
	Mover *Mover
}

// Dial returns a connection to whichever replica answers. It is made when it is
// first used, and made again for ever.
func Dial(config Config) (*grpc.ClientConn, error) {
	replicas := manual.NewBuilderWithScheme("reseal")
	replicas.InitialState(stateOf(config.Addresses))
	if config.Mover != nil {
		config.Mover.attach(&config, replicas)
	}
	options := []grpc.DialOption{
		grpc.WithResolvers(replicas),
		grpc.WithTransportCredentials(config.Credentials),
		grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":%t}}]}`, config.Shuffled)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
		grpc.WithWriteBufferSize(writeBuffer),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	}
	if config.Dial != nil {
		options = append(options, grpc.WithContextDialer(config.Dial))
	}
	conn, err := grpc.NewClient("reseal:///controlplane", options...)
	if err != nil {
		return nil, fmt.Errorf("control plane: %w", err)
	}
	if config.Mover != nil {
		config.Mover.conn = conn
	}
	return conn, nil
}
