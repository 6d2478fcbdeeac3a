package store

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
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// testEtcd is an etcd in this process, on unix sockets.
type testEtcd struct {
	config *embed.Config
	server *embed.Etcd
	socket string
}

func startEtcd(dir string) (*testEtcd, error) {
	e := &testEtcd{socket: filepath.Join(dir, "c.sock")}
	client := url.URL{Scheme: "unix", Path: e.socket}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p.sock")}
	e.config = quietConfig(filepath.Join(dir, "data"))
	e.config.ListenClientUrls, e.config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	e.config.ListenPeerUrls, e.config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	e.config.InitialCluster = e.config.Name + "=" + peer.String()
	return e, e.start()
}

func quietConfig(dir string) *embed.Config {
	config := embed.NewConfig()
	config.Dir = dir
	config.UnsafeNoFsync = true
	config.EnableGRPCGateway = false
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	return config
}

func (e *testEtcd) start() error {
	config := *e.config
	var err error
	if e.server, err = embed.StartEtcd(&config); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	select {
	case <-e.server.Server.ReadyNotify():
		return nil
	case <-ctx.Done():
		return errors.New("etcd does not get ready")
	}
}

func (e *testEtcd) stop() { e.server.Close() }

func newClient(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints,
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: time.Second,
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func sharedClient(t *testing.T) *clientv3.Client {
	t.Helper()
	return newClient(t, "unix://"+shared.socket)
}

var prefixes atomic.Int64

func newPrefix() string { return fmt.Sprintf("/t%d/", prefixes.Add(1)) }

// sealer is AES-GCM under a key of its own.
type sealer struct{ aead cipher.AEAD }

var errBadKey = errors.New("wrong key")

func newSealer(t testing.TB) *sealer {
	t.Helper()
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	return &sealer{aead: aead}
}

func (s *sealer) seal(plaintext, context []byte) ([]byte, error) {
	return s.aead.Seal(nil, nil, plaintext, context), nil
}

func (s *sealer) open(sealed, context []byte) ([]byte, error) {
	plaintext, err := s.aead.Open(nil, nil, sealed, context)
	if err != nil {
		return nil, errBadKey
	}
	return plaintext, nil
}

// journal is a log that a test can look into.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

func (j *journal) contains(text string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Contains(j.buf.String(), text)
}

// testConfig is a Config on the shared etcd, with a prefix of its own.
func testConfig(t *testing.T) (Config, *journal) {
	t.Helper()
	key, log := newSealer(t), &journal{}
	return Config{
		Client: sharedClient(t), Prefix: newPrefix(), Seal: key.seal, Open: key.open,
		Logger: newLogger(log),
	}, log
}

func newLogger(log *journal) *slog.Logger { return slog.New(slog.NewTextHandler(log, nil)) }

// run runs a store until the test ends, and returns when it is ready.
func run(t *testing.T, cfg Config) *Store {
	t.Helper()
	s, _ := runStoppable(t, cfg)
	awaitReady(t, s)
	return s
}

func awaitReady(t *testing.T, s *Store) {
	t.Helper()
	select {
	case <-s.Ready():
	case <-within(t, 15*time.Second).Done():
		t.Fatal("the store does not get ready")
	}
}

func runStoppable(t *testing.T, cfg Config) (*Store, func()) {
	t.Helper()
	s := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// waitFor polls until ok, for what only shows in a log or a counter.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func pool(name string, addresses ...string) *resealv1.Resource {
	spec := &resealv1.BackendPool{}
	for _, address := range addresses {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: address})
	}
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_BackendPool{BackendPool: spec},
	}
}

func labelled(r *resealv1.Resource, name, value string) *resealv1.Resource {
	r.Metadata.Labels = map[string]string{name: value}
	return r
}

func certificate(name, pem, key string) *resealv1.Resource {
	return &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{CertificatePem: pem, PrivateKeyPem: key}},
	}
}

func ref(kind, name string) *resealv1.ResourceRef {
	return &resealv1.ResourceRef{Kind: kind, Name: name}
}

func mustApply(t *testing.T, s *Store, resources ...*resealv1.Resource) *resealv1.ApplyResponse {
	t.Helper()
	resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: resources})
	if err != nil {
		t.Fatalf("Apply: %v", err)
	}
	return resp
}

func mustDelete(t *testing.T, s *Store, refs ...*resealv1.ResourceRef) *resealv1.DeleteResponse {
	t.Helper()
	resp, err := s.Delete(t.Context(), "tester", &resealv1.DeleteRequest{Resources: refs})
	if err != nil {
		t.Fatalf("Delete: %v", err)
	}
	return resp
}

// actions are the changes in short.
func actions(changes []*resealv1.Change) []string {
	short := []string{}
	for _, change := range changes {
		action := strings.ToLower(strings.TrimPrefix(change.GetAction().String(), "ACTION_"))
		short = append(short, change.GetResource().Key()+" "+action)
	}
	return short
}

// violations are those of err in short: "Kind/name: path".
func violationsOf(t *testing.T, err error) []string {
	t.Helper()
	var violations *resealv1.ViolationsError
	if !errors.As(err, &violations) {
		t.Fatalf("got %v, want violations", err)
	}
	short := []string{}
	for _, violation := range violations.Violations {
		short = append(short, violation.GetResource().Key()+": "+violation.GetField())
	}
	return short
}

// encoded is a snapshot in the form in which two are compared byte by byte.
func encoded(t testing.TB, snapshot *resealv1.Snapshot) map[string]string {
	t.Helper()
	found := map[string]string{"cluster": snapshot.ClusterID(), "revision": fmt.Sprint(snapshot.Revision())}
	for _, resource := range snapshot.All() {
		value, err := proto.MarshalOptions{Deterministic: true}.Marshal(resource)
		if err != nil {
			t.Fatal(err)
		}
		found[resource.Ref().Key()] = string(value)
	}
	return found
}

func diff(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// proxy stands between a client and etcd and can be cut.
type proxy struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu    sync.Mutex
	isCut bool
	conns map[net.Conn]bool
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: target, conns: map[net.Conn]bool{}}
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = listener.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) endpoint() string { return "unix://" + p.listener.Addr().String() }

func (p *proxy) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(conn) })
	}
}

func (p *proxy) serve(conn net.Conn) {
	defer conn.Close()
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	upstream, err := net.Dial("unix", target)
	if err != nil {
		return
	}
	defer upstream.Close()
	if !p.add(conn, upstream) {
		return
	}
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{conn, upstream}, {upstream, conn}} {
		both.Go(func() {
			_, _ = io.Copy(pair[0], pair[1])
			_ = pair[0].Close()
		})
	}
	both.Wait()
}

func (p *proxy) add(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range conns {
		p.conns[conn] = true
	}
	return !p.isCut
}

// cut ends all connections and refuses new ones until mend.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isCut = true
	for conn := range p.conns {
		_ = conn.Close()
	}
	clear(p.conns)
}

func (p *proxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isCut = false
}
