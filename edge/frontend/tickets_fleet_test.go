package frontend

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/keyring"
	"github.com/reseal/reseal/edge/loop"
	"github.com/reseal/reseal/edge/plan"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	epochPrepared = resealv1.EpochState_EPOCH_STATE_PREPARED
	epochActive   = resealv1.EpochState_EPOCH_STATE_ACTIVE
	epochRetired  = resealv1.EpochState_EPOCH_STATE_RETIRED

	keyRetired   = resealv1.MissReason_MISS_REASON_KEY_RETIRED
	staleKeyring = resealv1.MissReason_MISS_REASON_STALE_KEYRING
)

// keyStream is the control plane's stream of ticket keys.
type keyStream struct {
	grpc.ClientStream
	ctx  context.Context
	said <-chan *resealv1.HoldResponse
}

func (s keyStream) Send(*resealv1.HoldRequest) error { return nil }

func (s keyStream) Recv() (*resealv1.HoldResponse, error) {
	select {
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	case response, ok := <-s.said:
		if !ok {
			return nil, errors.New("the control plane is away")
		}
		return response, nil
	}
}

// keySource is an edge's Holder with what the control plane says to it.
type keySource struct {
	*keyring.Holder
	resealv1.KeyringServiceClient
	said   chan *resealv1.HoldResponse
	serial uint64
}

func (k *keySource) Hold(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[resealv1.HoldRequest, resealv1.HoldResponse], error) {
	return keyStream{ctx: ctx, said: k.said}, nil
}

// noDisk is a keyring.State without any file.
type noDisk struct{}

func (noDisk) Read(string) ([]byte, error) { return nil, fs.ErrNotExist }
func (noDisk) Write(string, []byte) error  { return nil }
func (noDisk) Remove(string) error         { return nil }

// newKeys runs a Holder that holds keyrings.
func newKeys(t testing.TB, keyrings ...*resealv1.KeyringSecrets) *keySource {
	t.Helper()
	k := &keySource{said: make(chan *resealv1.HoldResponse, 1)}
	k.Holder = keyring.New(keyring.Config{Edge: "e1", Client: k, State: noDisk{}, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := k.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	k.say(keyrings...)
	<-k.Synced()
	return k
}

func (k *keySource) say(keyrings ...*resealv1.KeyringSecrets) {
	k.serial++
	k.said <- &resealv1.HoldResponse{Serial: k.serial, Keyrings: keyrings}
}

// source is Config.TicketKeys.
func (k *keySource) source(ring, listener, policyKey string) TicketKeys {
	return k.Keys(ring, listener, policyKey)
}

// ring is a keyring whose secrets are the same for the same name and number.
func ring(name string, epochs ...*resealv1.EpochSecret) *resealv1.KeyringSecrets {
	for _, e := range epochs {
		secret := sha256.Sum256(fmt.Append(nil, name, e.GetEpoch().GetNumber()))
		e.Secret = secret[:]
	}
	return &resealv1.KeyringSecrets{
		Name: name, Epochs: epochs, RetireAfter: durationpb.New(12 * time.Hour), MaxActiveAge: durationpb.New(24 * time.Hour),
	}
}

func epoch(number uint64, state resealv1.EpochState) *resealv1.EpochSecret {
	now := timestamppb.Now()
	e := &resealv1.Epoch{Number: number, State: state, PreparedAt: now, ActivatedAt: now}
	if state == epochRetired {
		e.RetiredAt = now
	}
	return &resealv1.EpochSecret{Epoch: e}
}

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

var authorities int64

// newAuthority is not for use by several goroutines.
func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{}
	authorities++
	pair, der := a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: fmt.Sprint("root ", authorities)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	a.cert, a.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
	a.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

func (a *authority) sign(t testing.TB, template *x509.Certificate) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, der
}

// client issues a client's certificate.
func (a *authority) client(t testing.TB, serial int64) tls.Certificate {
	t.Helper()
	pair, _ := a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "client"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return pair
}

// revoke is a revocation list of certificates.
func (a *authority) revoke(t testing.TB, certs ...tls.Certificate) string {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(int64(len(certs) + 1)), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, cert := range certs {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.Leaf.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
}

// configured is what a plan makes of a listener with a policy.
func configured(t testing.TB, name string, cert tls.Certificate, policy *resealv1.TLSPolicy) exchange.Listener {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	metadata := func(name string) *resealv1.Metadata { return &resealv1.Metadata{Name: name, Uid: "uid-" + name} }
	compiled, violations := plan.Compile(resealv1.NewSnapshot("c", 1, []*resealv1.Resource{
		{Metadata: metadata("cert"), Spec: &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{
			CertificatePem: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})),
			PrivateKeyPem:  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		}}},
		{Metadata: metadata("policy"), Spec: &resealv1.Resource_TlsPolicy{TlsPolicy: policy}},
		{Metadata: metadata("web"), Spec: &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{
			Endpoints: []*resealv1.Endpoint{{Address: "127.0.0.1:1"}},
			Tls:       &resealv1.BackendTLS{ServerName: "backend.test"},
		}}},
		{Metadata: metadata(name), Spec: &resealv1.Resource_Listener{Listener: &resealv1.Listener{
			Address: "127.0.0.1:0", Certificates: []string{"cert"}, TlsPolicy: "policy", Pool: "web",
			Timeouts: &resealv1.ListenerTimeouts{Drain: durationpb.New(2 * time.Second)},
		}}},
	}), plan.Env{})
	for _, v := range violations {
		t.Fatal(v.Text())
	}
	return compiled.Listeners[0]
}

// newSharedEdge is an edge whose tickets are sealed with keys.
func newSharedEdge(t *testing.T, keys *keySource, change ...func(*exchange.Listener)) *edge {
	t.Helper()
	e := newEdge(t, answering("ok"), change...)
	e.frontend.cfg.TicketKeys = keys.source // before any client
	e.apply(e.listener("main", change...))
	return e
}

// acceptor makes a listener's handshakes, with the code that slots use and
// without sockets.
type acceptor struct {
	policy *ticketPolicy
	tls    *tls.Config
}

func newAcceptor(source func(string, string, string) TicketKeys, l exchange.Listener) *acceptor {
	f := New(Config{TicketKeys: source, Loops: loop.New(loop.Config{Loops: 1})})
	if l.TicketLifetime == 0 {
		l.TicketLifetime = defaultTicketLifetime
	}
	return &acceptor{policy: f.ticketPolicy(&l), tls: l.TLS}
}

// accept is what the edge and the client think of one handshake.
type accept struct {
	server, client tls.ConnectionState
	serverErr      error
	clientErr      error
	mechanism      resealv1.Mechanism
	miss           resealv1.MissReason
	tickets        *ticketHandshake
}

func (a accept) resumed() bool { return a.mechanism != 0 }

// bufferedPipe is a connection in memory. With net.Pipe, two sides that write at
// once wait for each other.
func bufferedPipe() (ours, theirs net.Conn) {
	listener := bufconn.Listen(1 << 16)
	defer listener.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := listener.Accept()
		accepted <- conn
	}()
	ours, err := listener.Dial()
	if err != nil {
		panic(err)
	}
	return ours, <-accepted
}

// connect makes a handshake, and has the client read a byte, before which TLS
// 1.3 sends tickets.
func (a *acceptor) connect(client *tls.Config) (result accept) {
	ours, theirs := bufferedPipe()
	conn := tls.Server(theirs, &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		result.tickets = a.policy.handshake()
		return result.tickets.config(a.tls, hello), nil
	}})
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if result.serverErr = conn.Handshake(); result.serverErr == nil {
			_, _ = conn.Write([]byte("x"))
			_ = conn.Close()
		}
	}()
	dialed := tls.Client(ours, client)
	_, result.clientErr = io.ReadFull(dialed, make([]byte, 1))
	result.client = dialed.ConnectionState()
	ours.Close()
	<-done
	if result.serverErr == nil {
		result.server = conn.ConnectionState()
		result.mechanism, result.miss = result.tickets.outcome(result.server)
	}
	return result
}

func clientConfig(name string, version uint16, cache tls.ClientSessionCache, certs ...tls.Certificate) *tls.Config {
	return &tls.Config{
		ServerName: name, InsecureSkipVerify: true, MaxVersion: version, ClientSessionCache: cache, Certificates: certs,
		CurvePreferences: []tls.CurveID{tls.CurveP256}, // fast under the race detector
	}
}

var bothVersions = []uint16{tls.VersionTLS12, tls.VersionTLS13}
