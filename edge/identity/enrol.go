package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// callTimeout bounds one call, with its connection.
	callTimeout = 10 * time.Second

	firstDelay   = 200 * time.Millisecond
	maxDelay     = 10 * time.Second // of enrolment, somebody waits for it
	maxTokenFile = 4096             // bytes
)

// connectFunc opens a connection to one replica. done closes it.
type connectFunc func(address string, config *tls.Config) (client resealv1.EnrollmentServiceClient, done func(), err error)

func connect(address string, config *tls.Config) (resealv1.EnrollmentServiceClient, func(), error) {
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	if err != nil {
		return nil, nil, err
	}
	return resealv1.NewEnrollmentServiceClient(conn), func() { _ = conn.Close() }, nil
}

// joinToken is a token as it is sent, with the authority that it pins.
type joinToken struct {
	text string
	pin  [sha256.Size]byte
}

func (t joinToken) hash() []byte {
	sum := sha256.Sum256([]byte(t.text))
	return sum[:]
}

// readToken reads the token file. Errors: ErrNoToken, ErrToken; they don't
// quote the token.
func (i *Identity) readToken() (joinToken, error) {
	if i.cfg.TokenFile == "" {
		return joinToken{}, fmt.Errorf("%w: %s", ErrNoToken, i.advice())
	}
	file, err := os.Open(i.cfg.TokenFile)
	if errors.Is(err, fs.ErrNotExist) {
		return joinToken{}, fmt.Errorf("%w: %s does not exist; %s", ErrNoToken, i.cfg.TokenFile, i.advice())
	}
	if err != nil {
		return joinToken{}, fmt.Errorf("join token: %w", err)
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxTokenFile+1))
	if err != nil {
		return joinToken{}, fmt.Errorf("join token: %w", err)
	}
	token, err := parseToken(text, i.cfg.CAHash)
	if err != nil {
		return joinToken{}, fmt.Errorf("%s: %w", i.cfg.TokenFile, err)
	}
	return token, nil
}

// parseToken reads "<ca-hash>.<token id>.<secret>", or without the hash, which
// then is caHash.
func parseToken(text []byte, caHash string) (joinToken, error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 || len(text) > maxTokenFile {
		return joinToken{}, fmt.Errorf("%w: it has %d bytes", ErrToken, len(text))
	}
	if bytes.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return joinToken{}, fmt.Errorf("%w: it is not one line of text", ErrToken)
	}
	configured, err := parsePin(caHash)
	if err != nil {
		return joinToken{}, err
	}
	token := joinToken{text: string(text), pin: configured}
	parts := strings.Split(token.text, ".")
	switch {
	case len(parts) == 2 && caHash == "":
		return joinToken{}, fmt.Errorf("%w: it carries no CA hash, so --ca-hash is needed", ErrToken)
	case len(parts) == 2:
		return token, nil
	case len(parts) != 3:
		return joinToken{}, fmt.Errorf("%w: it should have the form <ca-hash>.<token id>.<secret>", ErrToken)
	}
	if token.pin, err = parsePin(parts[0]); err != nil || parts[0] == "" {
		return joinToken{}, fmt.Errorf("%w: it should start with a CA hash of 64 hex digits", ErrToken)
	}
	if caHash != "" && token.pin != configured {
		return joinToken{}, fmt.Errorf("%w: it is for another authority than --ca-hash names", ErrToken)
	}
	return token, nil
}

// parsePin reads a hash in hex, upper or lower case; "" is zero.
func parsePin(text string) (pin [sha256.Size]byte, err error) {
	if text == "" {
		return pin, nil
	}
	raw, err := hex.DecodeString(strings.TrimPrefix(text, "sha256:"))
	if err != nil || len(raw) != len(pin) {
		return pin, fmt.Errorf("%w: --ca-hash should have 64 hex digits", ErrToken)
	}
	return [sha256.Size]byte(raw), nil
}

// enrolUntil enrols, again and again while no control plane can be reached.
func (i *Identity) enrolUntil(ctx context.Context, token joinToken) error {
	delay := firstDelay
	for {
		err := i.enrol(ctx, token)
		if err == nil || !retryable(err) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("enrol: %w (last: %w)", ctx.Err(), err)
		}
		i.cfg.Logger.Warn("enrolment failed, trying again", "edge", i.cfg.ID, "control_plane", i.cfg.ControlPlane, "error", err, "after", delay)
		if err := sleep(ctx, delay/2+rand.N(delay/2)); err != nil {
			return fmt.Errorf("enrol: %w", err)
		}
		delay = min(2*delay, maxDelay)
	}
}

func retryable(err error) bool {
	for _, final := range []error{ErrRefused, ErrPin, ErrRecord, ErrMismatch, errState} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// enrol asks every replica once, until one gives a certificate.
func (i *Identity) enrol(ctx context.Context, token joinToken) error {
	key, err := i.pendingKey()
	if err != nil {
		return err
	}
	request, err := newRequest(key)
	if err != nil {
		return err
	}
	var answer *resealv1.EnrollResponse
	err = i.askReplicas(func(address string) error {
		answer, err = i.enrolAt(ctx, address, token, request)
		return err
	})
	if err != nil {
		return err
	}
	return i.adopt(answer, token)
}

// adopt checks what the control plane gave, stores it and uses it from now on.
func (i *Identity) adopt(answer *resealv1.EnrollResponse, token joinToken) error {
	next := record{
		ID:             i.cfg.ID,
		TrustDomain:    answer.GetTrustDomain(),
		CAPEM:          answer.GetCaPem(),
		CertificatePEM: answer.GetCertificatePem(),
		PrivateKey:     i.stored.PendingKey,
		EnrolledWith:   token.hash(),
	}
	h, err := next.held()
	if err != nil {
		return fmt.Errorf("the control plane's answer: %w", err)
	}
	if !h.hasRoot(token.pin) {
		return fmt.Errorf("the control plane's answer: %w", ErrPin)
	}
	if i.cfg.TrustDomain != "" && h.trustDomain != i.cfg.TrustDomain {
		return fmt.Errorf("%w: the control plane's trust domain is %q, but --trust-domain is %q", ErrMismatch, h.trustDomain, i.cfg.TrustDomain)
	}
	if err := h.expired(); err != nil {
		return fmt.Errorf("the control plane's answer, by this machine's clock: %w", err)
	}
	if err := i.save(next); err != nil {
		return err
	}
	i.current.Store(h)
	i.cfg.Logger.Info("enrolled", "edge", i.cfg.ID, "trust_domain", h.trustDomain, "not_after", h.certificate.Leaf.NotAfter)
	return nil
}

// askReplicas calls ask for each address, starting anywhere, until one succeeds
// or fails for good. An address that is not the pinned control plane does not
// stop the others, but if none is, that is the error.
func (i *Identity) askReplicas(ask func(address string) error) error {
	addresses := i.cfg.ControlPlane
	var errs []error
	var pins int
	start := rand.IntN(len(addresses))
	for n := range addresses {
		address := addresses[(start+n)%len(addresses)]
		err := ask(address)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrPin):
			pins++
		case !retryable(err):
			return err
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	if pins > 0 && pins < len(errs) {
		// Not final: another replica may come back. Only the text is kept.
		return errors.New(strings.ReplaceAll(errors.Join(errs...).Error(), "\n", "; "))
	}
	return errors.Join(errs...)
}

func (i *Identity) enrolAt(ctx context.Context, address string, token joinToken, request []byte) (*resealv1.EnrollResponse, error) {
	var pinErr atomic.Pointer[error] // gRPC keeps only the text of handshake errors
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// VerifyConnection does it all: the roots come with the connection.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			err := verifyPinned(state.PeerCertificates, token.pin, i.cfg.TrustDomain)
			if err != nil {
				pinErr.Store(&err)
			}
			return err
		},
	}
	client, done, err := i.connect(address, config)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := client.Enroll(ctx, &resealv1.EnrollRequest{Token: token.text, CertificateRequest: request, Id: i.cfg.ID})
	if pin := pinErr.Load(); pin != nil && err != nil {
		return nil, *pin
	}
	switch status.Code(err) {
	case codes.PermissionDenied:
		i.refused = token.text
		return nil, fmt.Errorf("%w: it is unknown, used or expired; %s", ErrRefused, i.advice())
	case codes.InvalidArgument, codes.AlreadyExists:
		i.refused = token.text
		return nil, fmt.Errorf("%w: %s", ErrRefused, status.Convert(err).Message())
	}
	return answer, err
}

// verifyPinned accepts a control plane whose chain holds the pinned authority.
func verifyPinned(chain []*x509.Certificate, pin [sha256.Size]byte, trustDomain string) error {
	for _, certificate := range chain {
		if certificate.IsCA && sha256.Sum256(certificate.Raw) == pin {
			roots := x509.NewCertPool()
			roots.AddCert(certificate)
			err := verifyServer(chain, roots, trustDomain)
			var invalid x509.CertificateInvalidError
			if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
				return err // a clock that is not set yet is not a reason to give up
			}
			if err != nil {
				return fmt.Errorf("%w: %w", ErrPin, err)
			}
			return nil
		}
	}
	return fmt.Errorf("%w: its authority does not have the hash %x", ErrPin, pin)
}

// pendingKey is the key of the enrolment under way, made durable before its
// first use.
func (i *Identity) pendingKey() (*ecdsa.PrivateKey, error) {
	if key, err := parseKey(i.stored.PendingKey); err == nil {
		return key, nil
	}
	key, der, err := newKey()
	if err != nil {
		return nil, err
	}
	next := i.stored
	next.ID, next.PendingKey = i.cfg.ID, der
	return key, i.save(next)
}

// errState is the error for a state directory that can't be written.
var errState = errors.New("the state directory can't be written")

func (i *Identity) save(next record) error {
	data, err := json.Marshal(next)
	if err != nil {
		return err
	}
	defer clear(data)
	if err := i.cfg.State.Write(stateName, data); err != nil {
		return fmt.Errorf("%w: %w", errState, err)
	}
	i.stored, i.unsaved = next, false
	return nil
}
