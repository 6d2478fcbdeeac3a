package keyring

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// patience bounds every wait of a test.
const patience = 40 * time.Second

// source is a store in memory.
type source struct {
	mu      sync.Mutex
	newest  *resealv1.Snapshot
	changed chan struct{}
}

func newSource(resources ...*resealv1.Resource) *source {
	s := &source{newest: resealv1.NewSnapshot("c", 0, nil), changed: make(chan struct{})}
	s.apply(resources)
	return s
}

func (s *source) Next(ctx context.Context, after int64) (*resealv1.Snapshot, error) {
	for {
		s.mu.Lock()
		newest, changed := s.newest, s.changed
		s.mu.Unlock()
		if newest.Revision() > after {
			return newest, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *source) apply(upserts []*resealv1.Resource, deletes ...*resealv1.ResourceRef) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.newest = s.newest.With(s.newest.Revision()+1, upserts, deletes)
	close(s.changed)
	s.changed = make(chan struct{})
}

func many(resources ...*resealv1.Resource) []*resealv1.Resource { return resources }

func ref(name string) *resealv1.ResourceRef {
	return &resealv1.ResourceRef{Kind: "Keyring", Name: name}
}

var uids atomic.Int64

// keyringOf is a Keyring resource. Labels are pairs.
func keyringOf(name string, rotation, retire time.Duration, labels ...string) *resealv1.Resource {
	match := map[string]string{}
	for i := 0; i < len(labels); i += 2 {
		match[labels[i]] = labels[i+1]
	}
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name, Uid: fmt.Sprint("uid-", uids.Add(1))},
		Spec: &resealv1.Resource_Keyring{Keyring: &resealv1.Keyring{
			RotationInterval: durationpb.New(rotation), RetireAfter: durationpb.New(retire),
			EdgeSelector: &resealv1.EdgeSelector{MatchLabels: match},
		}},
	}
}

// sealer is AES-GCM under a key of its own. It remembers what it sealed.
type sealer struct {
	aead cipher.AEAD

	mu      sync.Mutex
	secrets [][]byte
}

func newSealer() *sealer {
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return &sealer{aead: aead}
}

func (s *sealer) seal(plaintext, context []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, bytes.Clone(plaintext))
	return s.aead.Seal(nil, nil, plaintext, context), nil
}

func (s *sealer) open(sealed, context []byte) ([]byte, error) {
	plaintext, err := s.aead.Open(nil, nil, sealed, context)
	if err != nil {
		return nil, errors.New("wrong key")
	}
	return plaintext, nil
}

// all are the secrets that there were.
func (s *sealer) all() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([][]byte(nil), s.secrets...)
}

// journal is a log that a test can look into.
type journal struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.data.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.data.String()
}

// fleet is a set of replicas over one prefix in etcd.
type testFleet struct {
	t      *testing.T
	prefix string
	source *source
	sealer *sealer
	log    *journal
	client *clientv3.Client
}

var prefixes atomic.Int64

func newFleet(t *testing.T, resources ...*resealv1.Resource) *testFleet {
	t.Helper()
	f := &testFleet{t: t, prefix: fmt.Sprintf("/t%d/", prefixes.Add(1)), source: newSource(resources...), sealer: newSealer(), log: &journal{}}
	f.client = f.dialEtcd()
	return f
}

func (f *testFleet) dialEtcd() *clientv3.Client {
	f.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + shared}, Logger: zap.NewNop()})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = client.Close() })
	return client
}

// replica is a control plane that is nothing but a keyring.
type replica struct {
	t        *testing.T
	name     string
	server   *Server
	registry *prometheus.Registry
	pipe     *bufconn.Listener
	conn     *grpc.ClientConn
	client   resealv1.KeyringServiceClient
	stop     func()
}

// edgeHeader stands for the certificate of the calling edge.
const edgeHeader = "test-edge"

func (f *testFleet) start(name string, options ...func(*Config)) *replica {
	f.t.Helper()
	r := &replica{t: f.t, name: name, registry: prometheus.NewRegistry(), pipe: bufconn.Listen(1 << 20)}
	writer := io.Writer(f.log)
	if os.Getenv("KEYRING_TEST_LOG") != "" {
		writer = io.MultiWriter(f.log, os.Stderr)
	}
	config := Config{
		Client: f.client, Prefix: f.prefix, Name: name, Source: f.source, Seal: f.sealer.seal, Unseal: f.sealer.open,
		Edge: callingEdge, Author: func(context.Context) string { return "operator/oscar" },
		Tick: 50 * time.Millisecond, LiveFor: 3 * time.Second, LeaderTTL: 10 * time.Second, RequestTimeout: 3 * time.Second,
		Logger:     slog.New(slog.NewTextHandler(writer, &slog.HandlerOptions{Level: slog.LevelDebug})).With("replica", name),
		Registerer: r.registry,
	}
	for _, option := range options {
		option(&config)
	}
	r.server = New(config)
	r.server.reload = 2 * time.Second
	r.serve()
	return r
}

func (r *replica) serve() {
	server := grpc.NewServer()
	resealv1.RegisterKeyringServiceServer(server, r.server)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- r.server.Run(ctx) }()
	go func() { ended <- server.Serve(r.pipe) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		server.Stop()
		for range 2 {
			if err := <-ended; err != nil {
				r.t.Errorf("replica %s ended with %v", r.name, err)
			}
		}
	})
	r.t.Cleanup(func() { r.stop() })
	var err error
	r.conn, err = grpc.NewClient("passthrough:///"+r.name, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.pipe.DialContext(ctx) }))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { r.conn.Close() })
	r.client = resealv1.NewKeyringServiceClient(r.conn)
}

func callingEdge(ctx context.Context) (string, map[string]string, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	ids := headers.Get(edgeHeader)
	if len(ids) == 0 {
		return "", nil, errors.New("no certificate")
	}
	return ids[0], nil, nil
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func (r *replica) status(name string) *resealv1.KeyringStatus {
	response, err := r.client.Status(context.Background(), &resealv1.StatusRequest{Keyring: name})
	if err != nil || len(response.GetKeyrings()) != 1 {
		return nil
	}
	return response.GetKeyrings()[0]
}

// epochs is a status in short: "1 retired, 2 active".
func epochs(status *resealv1.KeyringStatus) string {
	var words []string
	for _, e := range status.GetEpochs() {
		words = append(words, fmt.Sprintf("%d %s", e.GetNumber(), resealv1.Label(e.GetState())))
	}
	return strings.Join(words, ", ")
}

// settled is a fleet with one replica and one edge, which holds the first epoch and
// acks nothing.
func settled(t *testing.T, edge string) (*testFleet, *replica, *node) {
	t.Helper()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect(edge, mute)
	n.waitFor("default", "1 active")
	return f, r, n
}

// covers waits until the only edge is seen to hold the epochs of the default
// keyring, and to encrypt under one, as want says: "[1 2] 1".
func (r *replica) covers(want string) {
	r.t.Helper()
	eventually(r.t, "coverage "+want, func() bool {
		edges := r.status("default").GetEdges()
		return len(edges) == 1 && fmt.Sprint(edges[0].GetEpochs(), edges[0].GetActive()) == want
	})
}

func (r *replica) waitFor(name, want string) {
	r.t.Helper()
	var last *resealv1.KeyringStatus
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if last = r.status(name); last != nil && epochs(last) == want {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("keyring %s does not come to %q, it is %v", name, want, last)
		}
	}
}

func (r *replica) rotate(name string) uint64 {
	r.t.Helper()
	response, err := r.client.Rotate(context.Background(), &resealv1.RotateRequest{Keyring: name})
	if err != nil {
		r.t.Fatal(err)
	}
	return response.GetEpoch()
}

// node is an edge that follows the protocol.
type node struct {
	t      *testing.T
	id     string
	stream resealv1.KeyringService_HoldClient
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	mute   bool // does not ack
	newest *resealv1.HoldResponse
	count  int
	err    error
	onSet  func(*resealv1.HoldResponse)
}

// connect opens a stream as an edge.
func (r *replica) connect(id string, options ...func(*node)) *node {
	r.t.Helper()
	n := r.open(id, options...)
	request := &resealv1.HoldRequest{Edge: id, Labels: map[string]string{"id": id}}
	if err := n.stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
		r.t.Fatal(err)
	}
	go n.run()
	return n
}

func (r *replica) open(id string, options ...func(*node)) *node {
	r.t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), edgeHeader, id))
	n := &node{t: r.t, id: id, cancel: cancel, ended: make(chan struct{})}
	for _, option := range options {
		option(n)
	}
	var err error
	if n.stream, err = r.client.Hold(ctx); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(cancel)
	return n
}

func mute(n *node) { n.mute = true }

func (n *node) run() {
	defer close(n.ended)
	for {
		response, err := n.stream.Recv()
		n.mu.Lock()
		if err != nil {
			n.err = err
			n.mu.Unlock()
			return
		}
		n.newest, n.count = proto.CloneOf(response), n.count+1
		mute, onSet := n.mute, n.onSet
		n.mu.Unlock()
		if onSet != nil {
			onSet(response)
		}
		if !mute {
			_ = n.stream.Send(ackOf(response))
		}
	}
}

// hush makes the edge silent.
func (n *node) hush() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mute = true
}

// speak acks the newest response of an edge that was mute, and all that follow.
func (n *node) speak() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mute = false
	if n.newest != nil {
		_ = n.stream.Send(ackOf(n.newest))
	}
}

func ackOf(response *resealv1.HoldResponse) *resealv1.HoldRequest {
	request := &resealv1.HoldRequest{Serial: response.GetSerial()}
	for _, k := range response.GetKeyrings() {
		held := &resealv1.HeldKeyring{Name: k.GetName()}
		for _, e := range k.GetEpochs() {
			held.Epochs = append(held.Epochs, e.GetEpoch().GetNumber())
			if e.GetEpoch().GetState() == active {
				held.Active = e.GetEpoch().GetNumber()
			}
		}
		request.Keyrings = append(request.Keyrings, held)
	}
	return request
}

func (n *node) leave() {
	n.cancel()
	<-n.ended
}

// response is the newest that the edge got.
func (n *node) response() *resealv1.HoldResponse {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.newest
}

func (n *node) responses() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.count
}

func (n *node) reason() error {
	n.t.Helper()
	select {
	case <-n.ended:
	case <-time.After(patience):
		n.t.Fatalf("the stream of %s does not end", n.id)
	}
	return n.err
}

// holds is what the edge got of a keyring, in short; "none" without it.
func (n *node) holds(name string) string {
	for _, k := range n.response().GetKeyrings() {
		if k.GetName() != name {
			continue
		}
		var words []string
		for _, e := range k.GetEpochs() {
			words = append(words, fmt.Sprintf("%d %s", e.GetEpoch().GetNumber(), resealv1.Label(e.GetEpoch().GetState())))
		}
		return strings.Join(words, ", ")
	}
	return "none"
}

func (n *node) waitFor(name, want string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("edge %s gets %q of %s", n.id, want, name), func() bool { return n.response() != nil && n.holds(name) == want })
}

// secrets are those that the edge holds of a keyring, by number.
func (n *node) secrets(name string) map[uint64][]byte {
	found := map[uint64][]byte{}
	for _, k := range n.response().GetKeyrings() {
		for _, e := range k.GetEpochs() {
			if k.GetName() == name {
				found[e.GetEpoch().GetNumber()] = e.GetSecret()
			}
		}
	}
	return found
}

// values are all that etcd holds below the prefix.
func (f *testFleet) values(below string) map[string]string {
	f.t.Helper()
	answer, err := f.client.Get(context.Background(), f.prefix+below, clientv3.WithPrefix())
	if err != nil {
		f.t.Fatal(err)
	}
	found := map[string]string{}
	for _, kv := range answer.Kvs {
		found[strings.TrimPrefix(string(kv.Key), f.prefix)] = string(kv.Value)
	}
	return found
}
