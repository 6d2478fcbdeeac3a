package trust

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func createToken(t *testing.T, s *server, id string) *resealv1.CreateTokenResponse {
	t.Helper()
	token, err := s.admin(t).CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: id, Labels: map[string]string{"zone": "a"}})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestEnrolAndRenew(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	created := createToken(t, s, "e1")
	if want := s.trust.CAHash() + "." + created.GetInfo().GetTokenId() + "."; !strings.HasPrefix(created.GetToken(), want) {
		t.Errorf("token is %q, want prefix %q", created.GetToken(), want)
	}
	if got := created.GetInfo().GetCreatedBy(); got != "admin/root" {
		t.Errorf("created by %q", got)
	}
	key := newKey(t)
	answer, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: created.GetToken(), Id: "e1", CertificateRequest: newRequest(t, key)})
	if err != nil {
		t.Fatal(err)
	}
	certificate := parsePEM(t, answer.GetCertificatePem())
	if got := certificate.URIs[0].String(); got != "spiffe://reseal/edge/e1" || len(certificate.URIs) != 1 {
		t.Errorf("certificate for %v", certificate.URIs)
	}
	if left := time.Until(certificate.NotAfter); left > 24*time.Hour || left < 23*time.Hour {
		t.Errorf("it lives %s", left)
	}
	if answer.GetTrustDomain() != "reseal" || answer.GetCaPem() != string(s.trust.CAPEM()) || !key.PublicKey.Equal(certificate.PublicKey) {
		t.Error("wrong answer")
	}
	id, labels, err := s.trust.Edge(as("e1", certificate))
	if err != nil || id != "e1" || cmp.Diff(labels, map[string]string{"zone": "a"}) != "" {
		t.Errorf("%s, labels %v, %v", id, labels, err)
	}

	edge := s.enrollment(t, tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key})
	next := newKey(t)
	renewed, err := edge.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, next)})
	if err != nil {
		t.Fatal(err)
	}
	second := parsePEM(t, renewed.GetCertificatePem())
	if second.URIs[0].String() != "spiffe://reseal/edge/e1" || !next.PublicKey.Equal(second.PublicKey) || second.SerialNumber.Cmp(certificate.SerialNumber) == 0 {
		t.Error("wrong renewed certificate")
	}
	if renewed.GetCaPem() != answer.GetCaPem() {
		t.Error("other roots")
	}
	again := s.enrollment(t, tls.Certificate{Certificate: [][]byte{second.Raw}, PrivateKey: next})
	if _, err := again.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, newKey(t))}); err != nil {
		t.Errorf("renew the renewed: %v", err)
	}
}

// as is the context of a call of an edge.
func as(id string, certificate *x509.Certificate) context.Context {
	who := caller{identity: Identity{Role: resealv1.Role_ROLE_EDGE, Name: id}, certificate: certificate}
	return context.WithValue(context.Background(), callerKey{}, who)
}

// parsed is the certificate in c.
func parsed(t *testing.T, c tls.Certificate) *x509.Certificate {
	t.Helper()
	certificate, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// TestEdgesComeBackWithoutTheStore: what a replica knows of its edges suffices
// while the store does not answer; what it does not know, it does not guess.
func TestEdgesComeBackWithoutTheStore(t *testing.T) {
	cfg := testConfig(t)
	trust := openTrust(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- trust.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	s := serve(t, trust, true)
	enrol := func() *x509.Certificate {
		t.Helper()
		answer, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{
			Token: createToken(t, s, "e").GetToken(), Id: "e", CertificateRequest: newRequest(t, newKey(t)),
		})
		if err != nil {
			t.Fatal(err)
		}
		return parsePEM(t, answer.GetCertificatePem())
	}
	first, second := enrol(), enrol()
	eventually(t, "the replica knows the edge", func() bool {
		record, ok := trust.registry.edge("e")
		return ok && record.Enrolment == second.Subject.SerialNumber
	})
	_, _, err := trust.Edge(as("e", first))
	wantCode(t, err, codes.PermissionDenied, "enrolled anew")
	if id, labels, err := trust.Edge(as("nobody", parsed(t, edgeCertificate(t, trust, "nobody", "")))); id != "nobody" || labels != nil || err != nil {
		t.Errorf("an edge that is not known: %q, %v, %v", id, labels, err)
	}
	trust.client.KV = failingKV{}
	if id, labels, err := trust.Edge(as("e", second)); id != "e" || labels["zone"] != "a" || err != nil {
		t.Errorf("without the store: %q, %v, %v", id, labels, err)
	}
	for id, certificate := range map[string]*x509.Certificate{"e": first, "nobody": parsed(t, edgeCertificate(t, trust, "nobody", ""))} {
		_, _, err := trust.Edge(as(id, certificate))
		wantCode(t, err, codes.Unavailable)
	}
}

// What is wrong with the request does not cost the token.
func TestBadRequestsKeepTheToken(t *testing.T) {
	s := serve(t, openTrust(t, testConfig(t)), true)
	anonymous := s.enrollment(t)
	token := createToken(t, s, "e").GetToken()
	smallRSA, err := x509.ParsePKCS1PrivateKey(small1024(t))
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := newRequest(t, newKey(t))
	forged[len(forged)-1] ^= 1
	for name, c := range map[string]struct {
		id      string
		request []byte
		words   string
	}{
		"other id":  {"f", newRequest(t, newKey(t)), `for edge "e", not for "f"`},
		"no id":     {"", newRequest(t, newKey(t)), `for edge "e"`},
		"empty":     {"e", nil, "PKCS #10"},
		"garbage":   {"e", []byte("garbage"), "PKCS #10"},
		"huge":      {"e", make([]byte, maxRequestSize+1), "at most"},
		"signature": {"e", forged, "signature"},
		"RSA 1024":  {"e", newRequest(t, smallRSA), "2048"},
		"P-224":     {"e", newRequest(t, p224), "P-256"},
		"P-521":     {"e", newRequest(t, p521), "P-256"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: c.id, CertificateRequest: c.request})
			wantCode(t, err, codes.InvalidArgument, c.words)
		})
	}
	if _, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: "e", CertificateRequest: newRequest(t, newKey(t))}); err != nil {
		t.Errorf("the token was spent: %v", err)
	}
}

// small1024 is an RSA key that Go refuses to generate today.
func small1024(t *testing.T) []byte {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return x509.MarshalPKCS1PrivateKey(key)
}

func TestKeyTypes(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []any{newKey(t), p384, ed, rsa2048} {
		if _, err := parseRequest(newRequest(t, key)); err != nil {
			t.Errorf("%T: %v", key, err)
		}
	}
}

func TestLostAnswerIsGivenAgain(t *testing.T) {
	cfg := testConfig(t)
	s := serve(t, openTrust(t, cfg), true)
	anonymous := s.enrollment(t)
	created := createToken(t, s, "e")
	key := newKey(t)
	enrol := func(key *ecdsa.PrivateKey) error {
		_, err := anonymous.Enroll(t.Context(), &resealv1.EnrollRequest{Token: created.GetToken(), Id: "e", CertificateRequest: newRequest(t, key)})
		return err
	}
	// The store loses the answer of the transaction that used the token.
	faults := &faulty{KV: cfg.Client.KV}
	cfg.Client.KV = faults
	faults.before.Store(1)
	wantCode(t, enrol(key), codes.Unavailable)
	faults.after.Store(1)
	wantCode(t, enrol(key), codes.Unavailable)
	for range 2 {
		if err := enrol(key); err != nil {
			t.Errorf("again with the same key: %v", err)
		}
	}
	wantCode(t, enrol(newKey(t)), codes.PermissionDenied)

	// Once revoked, not even the same key.
	if _, err := s.admin(t).RevokeToken(t.Context(), &resealv1.RevokeTokenRequest{TokenId: created.GetInfo().GetTokenId()}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, enrol(key), codes.PermissionDenied)
}

func TestRacingEnrolments(t *testing.T) {
	cfg := testConfig(t)
	var clients []resealv1.EnrollmentServiceClient
	var first *server
	for range 3 {
		replica := cfg
		replica.Client = newClient(t)
		s := serve(t, openTrust(t, replica), true)
		if first == nil {
			first = s
		}
		clients = append(clients, s.enrollment(t))
	}
	for name, sameKey := range map[string]bool{"keys of their own": false, "one key": true} {
		t.Run(name, func(t *testing.T) {
			token := createToken(t, first, "e").GetToken()
			one := newRequest(t, newKey(t))
			var group sync.WaitGroup
			var admitted, refused atomic.Int32
			for i := range 18 {
				request := one
				if !sameKey {
					request = newRequest(t, newKey(t))
				}
				group.Go(func() {
					_, err := clients[i%3].Enroll(t.Context(), &resealv1.EnrollRequest{Token: token, Id: "e", CertificateRequest: request})
					switch status.Code(err) {
					case codes.OK:
						admitted.Add(1)
					case codes.PermissionDenied:
						refused.Add(1)
					default:
						t.Error(err)
					}
				})
			}
			group.Wait()
			want := int32(1)
			if sameKey {
				want = 18
			}
			if admitted.Load() != want || refused.Load() != 18-want {
				t.Errorf("%d admitted, %d refused", admitted.Load(), refused.Load())
			}
		})
	}
}

func TestRenewalNeedsTheEnrolment(t *testing.T) {
	cfg := testConfig(t)
	s := serve(t, openTrust(t, cfg), true)
	enrol := func() (tls.Certificate, resealv1.EnrollmentServiceClient) {
		key := newKey(t)
		answer, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: createToken(t, s, "e").GetToken(), Id: "e", CertificateRequest: newRequest(t, key)})
		if err != nil {
			t.Fatal(err)
		}
		certificate := tls.Certificate{Certificate: [][]byte{parsePEM(t, answer.GetCertificatePem()).Raw}, PrivateKey: key}
		return certificate, s.enrollment(t, certificate)
	}
	renew := func(client resealv1.EnrollmentServiceClient) error {
		_, err := client.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, newKey(t))})
		return err
	}
	_, old := enrol()
	if err := renew(old); err != nil {
		t.Fatal(err)
	}
	_, err := old.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: []byte("garbage")})
	wantCode(t, err, codes.InvalidArgument)

	// Enrolled anew: what was issued before does not renew.
	_, current := enrol()
	wantCode(t, renew(old), codes.PermissionDenied, "edge/e")
	if err := renew(current); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.Client.Delete(t.Context(), cfg.Prefix+edgesPrefix+"e"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, renew(current), codes.PermissionDenied, "edge/e")
}

func TestStoreDown(t *testing.T) {
	cfg := testConfig(t)
	trust := openTrust(t, cfg)
	s := serve(t, trust, true)
	admin := s.admin(t)
	edge := s.enrollment(t, edgeCertificate(t, trust, "e", ""))
	if err := cfg.Client.Close(); err != nil && err != context.Canceled {
		t.Fatal(err)
	}
	cfg.Client.KV = failingKV{}
	_, err := admin.CreateToken(t.Context(), &resealv1.CreateTokenRequest{Id: "e"})
	wantCode(t, err, codes.Unavailable)
	_, err = admin.ListTokens(t.Context(), &resealv1.ListTokensRequest{})
	wantCode(t, err, codes.Unavailable)
	_, err = admin.RevokeToken(t.Context(), &resealv1.RevokeTokenRequest{TokenId: strings.Repeat("0", 16)})
	wantCode(t, err, codes.Unavailable)
	_, err = edge.Renew(t.Context(), &resealv1.RenewRequest{CertificateRequest: newRequest(t, newKey(t))})
	wantCode(t, err, codes.Unavailable)
	_, err = s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: newCredential().text(trust.CAHash())})
	wantCode(t, err, codes.Unavailable)
	_, _, err = trust.Edge(as("e", parsed(t, edgeCertificate(t, trust, "e", ""))))
	wantCode(t, err, codes.Unavailable)
}

type failingKV struct{ clientv3.KV }

func (failingKV) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return nil, status.Error(codes.Unavailable, "no leader")
}

func (failingKV) Delete(context.Context, string, ...clientv3.OpOption) (*clientv3.DeleteResponse, error) {
	return nil, context.DeadlineExceeded
}

func TestMalformedRecord(t *testing.T) {
	cfg := testConfig(t)
	s := serve(t, openTrust(t, cfg), true)
	for _, key := range []string{tokensPrefix + "x", edgesPrefix + "e"} {
		if _, err := cfg.Client.Put(t.Context(), cfg.Prefix+key, "{"); err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.admin(t).ListTokens(t.Context(), &resealv1.ListTokensRequest{})
	wantCode(t, err, codes.Internal)
	_, _, err = s.trust.Edge(as("e", parsed(t, edgeCertificate(t, s.trust, "e", ""))))
	wantCode(t, err, codes.Internal)
}

// Neither the store nor the log holds a secret in clear.
func TestSecretsStaySecret(t *testing.T) {
	cfg := testConfig(t)
	log := &logs{}
	cfg.Logger = newLogger(log)
	s := serve(t, openTrust(t, cfg), true)
	var secrets [][]byte
	secret := func(raw []byte) {
		secrets = append(secrets, raw, []byte(base64.StdEncoding.EncodeToString(raw)), []byte(base64.RawURLEncoding.EncodeToString(raw)), []byte(hex.EncodeToString(raw)))
	}
	for i := range 3 {
		created := createToken(t, s, "e")
		c, ok := parseCredential(created.GetToken(), s.trust.CAHash())
		if !ok {
			t.Fatal("unreadable token")
		}
		secret(c.secret)
		if i > 0 {
			_, err := s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: created.GetToken(), Id: "e", CertificateRequest: newRequest(t, newKey(t))})
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.enrollment(t).Enroll(t.Context(), &resealv1.EnrollRequest{Token: created.GetToken(), Id: "e", CertificateRequest: newRequest(t, newKey(t))})
			wantCode(t, err, codes.PermissionDenied)
		}
	}
	key := s.trust.opened.Load().authority.key.(*ecdsa.PrivateKey)
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	secret(scalar)
	kek, err := readKEK(cfg.KEKFile)
	if err != nil {
		t.Fatal(err)
	}
	secret(kek)
	content := storeContent(t, cfg)
	if len(content) < 4 {
		t.Fatalf("only %d keys in the store", len(content))
	}
	content["the log"] = []byte(log.String())
	for name, value := range content {
		for _, s := range secrets {
			if bytes.Contains(value, s) {
				t.Errorf("%s holds a secret", name)
			}
		}
	}
	for _, want := range []string{"join token created", "edge enrolled", "admin/root", "enrolment refused"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(newRequest(f, newKey(f)))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		request, err := parseRequest(der)
		if err == nil && (request.publicKey == nil || len(request.keyHash) != 32) {
			t.Fatal("an empty request")
		}
	})
}
