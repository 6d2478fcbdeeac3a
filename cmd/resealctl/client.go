package main

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxReceiveBytes bounds one answer: 10,000 resources with room to spare.
const maxReceiveBytes = 64 << 20

// client is the connection to a control plane.
type client struct {
	target  *target
	conn    *grpc.ClientConn
	dials   *dialLog
	timeout time.Duration
	// answered: a call succeeded.
	answered atomic.Bool
	silent   silentReplicas

	admin      resealv1.AdminServiceClient
	fleet      resealv1.FleetServiceClient
	tally      resealv1.TallyServiceClient
	enrollment resealv1.EnrollmentServiceClient
}

// connect makes the client, once. Nothing is dialled before the first call.
func (a *app) connect() (*client, error) {
	if a.client != nil {
		return a.client, nil
	}
	t, err := a.target()
	if err != nil {
		return nil, err
	}
	c, err := newClient(t, a.settings.timeout)
	if err != nil {
		return nil, err
	}
	c.silent.warnf = a.warnf
	a.client = c
	a.renew(c)
	return c, nil
}

func newClient(t *target, timeout time.Duration) (*client, error) {
	tlsConfig, err := t.tlsConfig()
	if err != nil {
		return nil, err
	}
	c := &client{target: t, dials: newDialLog(t.controlPlane), timeout: timeout}
	// The addresses are tried one after the other (pick_first).
	addresses := manual.NewBuilderWithScheme("reseal")
	var state resolver.State
	for _, address := range t.controlPlane {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	addresses.InitialState(state)
	c.conn, err = grpc.NewClient("reseal:///controlplane",
		grpc.WithResolvers(addresses),
		grpc.WithTransportCredentials(&loggedCredentials{credentials.NewTLS(tlsConfig), c.dials}),
		grpc.WithContextDialer(c.dials.dial),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: timeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceiveBytes)),
		grpc.WithUnaryInterceptor(c.unary),
		grpc.WithStreamInterceptor(c.stream),
	)
	if err != nil {
		return nil, err
	}
	c.admin = resealv1.NewAdminServiceClient(c.conn)
	c.fleet = resealv1.NewFleetServiceClient(c.conn)
	c.tally = resealv1.NewTallyServiceClient(c.conn)
	c.enrollment = resealv1.NewEnrollmentServiceClient(c.conn)
	return c, nil
}

// unary bounds each call in time and turns its status into an error for people.
func (c *client) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	bounded, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if ctx.Value(unexplainedKey{}) != nil {
		return invoke(bounded, method, req, reply, conn, opts...)
	}
	if err := invoke(bounded, method, req, reply, conn, opts...); err != nil {
		return c.explain(ctx, method, err)
	}
	c.silent.note(reply)
	return c.explain(ctx, method, nil)
}

type unexplainedKey struct{}

// unexplained is for calls that need the status itself.
func unexplained(ctx context.Context) context.Context {
	return context.WithValue(ctx, unexplainedKey{}, true)
}

// stream does the same for a stream. Only its start is bounded.
func (c *client) stream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, conn, method, opts...)
	if err != nil {
		return nil, c.explain(ctx, method, err)
	}
	return &explainedStream{ClientStream: stream, client: c, method: method}, nil
}

type explainedStream struct {
	grpc.ClientStream
	client *client
	method string
}

func (s *explainedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		s.client.silent.note(m)
	}
	return s.client.explain(s.Context(), s.method, err)
}

// loggedCredentials notes how each TLS handshake ended.
type loggedCredentials struct {
	credentials.TransportCredentials
	dials *dialLog
}

func (l *loggedCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := l.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if logged, ok := conn.(*loggedConn); ok {
		l.dials.note(logged.address, handshakeProblem(err))
	}
	return secure, info, err
}

func (l *loggedCredentials) Clone() credentials.TransportCredentials {
	return &loggedCredentials{l.TransportCredentials.Clone(), l.dials}
}
