package fleetsim

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// enrollers is below what a control plane works on at once.
	enrollers = 8
	// perConnection is how many edges enrol over one connection: those without a
	// certificate may neither live long nor send much.
	perConnection = 100
)

// Enrol gives n edges an identity by join tokens, as any edge gets one. They are
// named sim-00000 and so on.
func (a *Admin) Enrol(ctx context.Context, n int) ([]*Identity, error) {
	made := make([]*Identity, n)
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range min(enrollers, n) {
		group.Go(func() error {
			for {
				last := int(next.Add(perConnection))
				if last-perConnection >= n {
					return nil
				}
				if err := a.enrol(ctx, last-perConnection, made[last-perConnection:min(last, n)]); err != nil {
					return err
				}
			}
		})
	}
	return made, group.Wait()
}

// Identity is who a simulated edge is.
type Identity struct {
	id    string
	pair  tls.Certificate
	roots *x509.CertPool
}

func (a *Admin) enrol(ctx context.Context, first int, into []*Identity) error {
	anonymous, err := a.dial(nil)
	if err != nil {
		return err
	}
	defer anonymous.Close()
	for i := range into {
		if into[i], err = a.enrolOne(ctx, anonymous, fmt.Sprintf("sim-%05d", first+i)); err != nil {
			return err
		}
	}
	return nil
}

func (a *Admin) enrolOne(ctx context.Context, anonymous *grpc.ClientConn, id string) (*Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	created, err := resealv1.NewEnrollmentServiceClient(a.conn).CreateToken(ctx, &resealv1.CreateTokenRequest{Id: id})
	if err != nil {
		return nil, fmt.Errorf("a token for %s: %w", id, err)
	}
	answer, err := resealv1.NewEnrollmentServiceClient(anonymous).Enroll(ctx, &resealv1.EnrollRequest{
		Token: created.GetToken(), CertificateRequest: request, Id: id,
	})
	if err != nil {
		return nil, fmt.Errorf("enrol %s: %w", id, err)
	}
	block, _ := pem.Decode([]byte(answer.GetCertificatePem()))
	if block == nil {
		return nil, errors.New("enrol " + id + ": there is no certificate in the answer")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("enrol %s: %w", id, err)
	}
	return &Identity{id: id, pair: tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key, Leaf: leaf}, roots: a.roots}, nil
}
