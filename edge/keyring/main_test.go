package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	prepared = resealv1.EpochState_EPOCH_STATE_PREPARED
	active   = resealv1.EpochState_EPOCH_STATE_ACTIVE
	retired  = resealv1.EpochState_EPOCH_STATE_RETIRED

	good        = resealv1.MissReason_MISS_REASON_UNSPECIFIED
	keyUnknown  = resealv1.MissReason_MISS_REASON_KEY_UNKNOWN
	keyRetired  = resealv1.MissReason_MISS_REASON_KEY_RETIRED
	damaged     = resealv1.MissReason_MISS_REASON_UNDECRYPTABLE
	mismatch    = resealv1.MissReason_MISS_REASON_POLICY_MISMATCH
	staleReason = resealv1.MissReason_MISS_REASON_STALE_KEYRING
)

// controlPlane sends what is said last, again after each say.
type controlPlane struct {
	resealv1.UnimplementedKeyringServiceServer

	mu       sync.Mutex
	said     []*resealv1.KeyringSecrets
	changed  chan struct{} // closed by say
	away     bool
	asked    int
	requests []*resealv1.HoldRequest
	streams  map[context.Context]context.CancelFunc
}

func (c *controlPlane) Hold(stream grpc.BidiStreamingServer[resealv1.HoldRequest, resealv1.HoldResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	c.mu.Lock()
	c.asked++
	if c.away {
		c.mu.Unlock()
		return status.Error(codes.Unavailable, "away")
	}
	c.streams[ctx] = cancel
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.streams, ctx)
	}()
	requests := make(chan error)
	go func() {
		for {
			request, err := stream.Recv()
			if err == nil {
				c.mu.Lock()
				c.requests = append(c.requests, request)
				c.mu.Unlock()
			}
			select {
			case requests <- err:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	if err := <-requests; err != nil {
		return err
	}
	for serial := uint64(1); ; serial++ {
		c.mu.Lock()
		said, changed := c.said, c.changed
		c.mu.Unlock()
		if err := stream.Send(&resealv1.HoldResponse{Serial: serial, Keyrings: said}); err != nil {
			return err
		}
		for waiting := true; waiting; {
			select {
			case err := <-requests:
				if err != nil {
					return err
				}
			case <-changed:
				waiting = false
			case <-ctx.Done():
				return status.Error(codes.Unavailable, "the stream is dropped")
			}
		}
	}
}

// say makes keyrings what edges are to hold.
func (c *controlPlane) say(keyrings ...*resealv1.KeyringSecrets) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said = keyrings
	close(c.changed)
	c.changed = make(chan struct{})
}

// leave ends all streams and refuses new ones.
func (c *controlPlane) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = true
	for _, cancel := range c.streams {
		cancel()
	}
}

func (c *controlPlane) comeBack() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = false
}

func (c *controlPlane) last() *resealv1.HoldRequest {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.requests) == 0 {
		return nil
	}
	return c.requests[len(c.requests)-1]
}

// disk is a State.
type disk struct {
	mu     sync.Mutex
	data   []byte
	writes int
	err    error
	slow   time.Duration
}

func (d *disk) Read(name string) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.data == nil || name != "keyring" {
		return nil, fs.ErrNotExist
	}
	return bytes.Clone(d.data), nil
}

func (d *disk) Write(name string, data []byte) error {
	time.Sleep(d.slow)
	d.mu.Lock()
	defer d.mu.Unlock()
	if name != "keyring" {
		return errors.New("unexpected name " + name)
	}
	if d.err != nil {
		return d.err
	}
	d.data, d.writes = bytes.Clone(data), d.writes+1
	return nil
}

func (d *disk) Remove(string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.data = nil
	return d.err
}

// kept is what the disk holds.
func (d *disk) kept(t *testing.T) []*resealv1.KeyringSecrets {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	kept := &resealv1.HoldResponse{}
	if err := proto.Unmarshal(d.data, kept); err != nil {
		t.Fatal(err)
	}
	return kept.GetKeyrings()
}

// logs collects log lines.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) count(words string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), words)
}

// edge is a running Holder with its control plane.
type edge struct {
	*Holder
	server   *controlPlane
	disk     *disk
	logs     *logs
	registry *prometheus.Registry
	stop     func()
}

func start(t *testing.T, server *controlPlane, kept *disk, options ...func(*Config)) *edge {
	t.Helper()
	pipe := bufconn.Listen(1 << 20)
	grpcServer := grpc.NewServer()
	resealv1.RegisterKeyringServiceServer(grpcServer, server)
	serving := make(chan error, 1)
	go func() { serving <- grpcServer.Serve(pipe) }()
	conn, err := grpc.NewClient("passthrough:///", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	e := &edge{server: server, disk: kept, logs: &logs{}, registry: prometheus.NewRegistry()}
	config := Config{
		Edge: "e1", Labels: map[string]string{"site": "a"},
		Client: resealv1.NewKeyringServiceClient(conn), State: kept, KeepOnDisk: true,
		Logger: slog.New(slog.NewTextHandler(e.logs, nil)), Registerer: e.registry,
	}
	for _, option := range options {
		option(&config)
	}
	e.Holder = New(config)
	ctx, cancel := context.WithCancel(t.Context())
	running := make(chan error, 1)
	go func() { running <- e.Run(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-running; err != nil {
			t.Errorf("Run: %v", err)
		}
		conn.Close()
		grpcServer.Stop()
		if err := <-serving; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(e.stop)
	return e
}

func newControlPlane(keyrings ...*resealv1.KeyringSecrets) *controlPlane {
	return &controlPlane{said: keyrings, changed: make(chan struct{}), streams: map[context.Context]context.CancelFunc{}}
}

func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// rotation makes the epochs of one keyring.
type rotation struct {
	name    string
	secrets map[uint64][]byte
	retire  time.Duration
	maxAge  time.Duration
}

func newRotation(name string) *rotation {
	return &rotation{name: name, secrets: map[uint64][]byte{}, retire: 12 * time.Hour, maxAge: 24 * time.Hour}
}

// epoch is one that entered its state at a time.
func (r *rotation) epoch(number uint64, state resealv1.EpochState, at time.Time) *resealv1.EpochSecret {
	if r.secrets[number] == nil {
		r.secrets[number] = make([]byte, secretSize)
		_, _ = rand.Read(r.secrets[number])
	}
	e := &resealv1.Epoch{Number: number, State: state, PreparedAt: timestamppb.New(at)}
	if state == active || state == retired {
		e.ActivatedAt = timestamppb.New(at)
	}
	if state == retired {
		e.RetiredAt = timestamppb.New(at)
	}
	return &resealv1.EpochSecret{Epoch: e, Secret: bytes.Clone(r.secrets[number])}
}

func (r *rotation) keyring(epochs ...*resealv1.EpochSecret) *resealv1.KeyringSecrets {
	return &resealv1.KeyringSecrets{
		Name: r.name, Epochs: epochs, RetireAfter: durationpb.New(r.retire), MaxActiveAge: durationpb.New(r.maxAge),
	}
}

// holding is a Holder that holds keyrings without a control plane.
func holding(t testing.TB, keyrings ...*resealv1.KeyringSecrets) *Holder {
	t.Helper()
	h := New(Config{Logger: slog.New(slog.DiscardHandler)})
	if err := h.apply(&resealv1.HoldResponse{Keyrings: keyrings}, true); err != nil {
		t.Fatal(err)
	}
	return h
}

// numbers are those of the epochs that are held.
func (e *edge) numbers(keyring string) []uint64 {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.rings[keyring].numbers()
}

func (e *edge) epoch(number uint64) *epoch {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.rings["default"].epochs[number]
}

// zeroed tells whether an epoch's secret is overwritten.
func (e *edge) zeroed(of *epoch) bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return of.secret == [secretSize]byte{}
}
