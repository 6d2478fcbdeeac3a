// Package link is an edge's way to the control plane: how replicas are dialled, what
// is said on one stream to them, and when one that broke is tried again.
package link

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
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
	// A connection on which nothing has come for pingAfter is asked for a sign of life, and
	// given up without one within pingTimeout. That is long for the same reason: to a
	// fleet that comes back a replica has much to send, and those that gave it up would have
	// it begin again. What the kernel of the other side does not acknowledge is given up
	// after silence: a host or a network that is gone is found sooner than a process that
	// is busy.
	pingAfter   = 10 * time.Second
	pingTimeout = 20 * time.Second
	silence     = 5 * time.Second
)

// Config is what Dial needs.
type Config struct {
	// Addresses of the control plane's replicas, host:port. Required.
	Addresses []string
	// Shuffled spreads edges over the replicas. Default: the first that answers.
	Shuffled bool
	// Credentials secure the connection. Required.
	Credentials credentials.TransportCredentials
	// Dial makes the TCP connection. Default: net.Dialer, with a connection that ends when
	// what was sent is not acknowledged for 5 s.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Mover moves the connection to another replica when it is asked to. Nil: it
	// stays.
	Mover *Mover
}

// Dial returns a connection to whichever replica answers. It is made when it is
// first used, and made again for ever.
func Dial(config Config) (*grpc.ClientConn, error) {
	if config.Dial == nil {
		config.Dial = dialTCP
	}
	replicas := manual.NewBuilderWithScheme("reseal")
	replicas.InitialState(stateOf(config.Addresses))
	if config.Mover != nil {
		config.Mover.attach(&config, replicas)
	}
	options := []grpc.DialOption{
		grpc.WithResolvers(replicas),
		grpc.WithTransportCredentials(config.Credentials),
		grpc.WithContextDialer(config.Dial),
		grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":%t}}]}`, config.Shuffled)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
		grpc.WithWriteBufferSize(writeBuffer),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
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

// Link carries conversations on one stream, with one back-off. It is what the edge's
// sides of the services take for a connection: each stream that they start on it is a
// conversation.
type Link struct {
	conn    *grpc.ClientConn
	lost    func(err error, again time.Duration)
	methods map[string]bool
	wanted  chan struct{} // closed when somebody wants to talk
	want    func()

	mu      sync.Mutex
	session *session
	direct  bool          // the control plane knows no links
	changed chan struct{} // closed when one of the two changes
}

// directFor is for how long streams of their own are used with a control plane that
// knows no links.
const directFor = time.Minute

// New makes a Link over conn that carries these methods, such as
// "/reseal.v1.FeedService/Sync"; others go over conn as they are. Run connects it. Lost
// hears why a link has ended, and when the next is tried.
func New(conn *grpc.ClientConn, lost func(err error, again time.Duration), methods ...string) *Link {
	l := &Link{conn: conn, lost: lost, methods: map[string]bool{}, wanted: make(chan struct{}), changed: make(chan struct{})}
	l.want = sync.OnceFunc(func() { close(l.wanted) })
	for _, method := range methods {
		l.methods[method] = true
	}
	return l
}

// Run keeps a link, once somebody has something to say, until ctx ends.
func (l *Link) Run(ctx context.Context) error {
	select {
	case <-l.wanted:
	case <-ctx.Done():
		return nil
	}
	Keep(ctx, l.serve, l.lost)
	return nil
}

// serve runs one link to its end.
func (l *Link) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := resealv1.NewLinkServiceClient(l.conn).Connect(ctx)
	if err != nil {
		return err
	}
	s := &session{stream: stream, open: map[uint64]*conversation{}}
	l.set(s, false)
	err = s.receive()
	l.set(nil, status.Code(err) == codes.Unimplemented)
	s.lose()
	if status.Code(err) != codes.Unimplemented {
		return err
	}
	defer l.set(nil, false)
	timer := time.NewTimer(directFor)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil
}

func (l *Link) set(s *session, direct bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session, l.direct = s, direct
	close(l.changed)
	l.changed = make(chan struct{})
}

// Invoke implements grpc.ClientConnInterface.
func (l *Link) Invoke(ctx context.Context, method string, args, reply any, options ...grpc.CallOption) error {
	return l.conn.Invoke(ctx, method, args, reply, options...)
}

// NewStream implements grpc.ClientConnInterface. It waits for a link.
func (l *Link) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, options ...grpc.CallOption) (grpc.ClientStream, error) {
	if !l.methods[method] {
		return l.conn.NewStream(ctx, desc, method, options...)
	}
	l.want()
	for {
		l.mu.Lock()
		s, direct, changed := l.session, l.direct, l.changed
		l.mu.Unlock()
		switch {
		case direct:
			return l.conn.NewStream(ctx, desc, method, options...)
		case s != nil:
			if c, err := s.begin(ctx, method); err == nil {
				return c, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}
