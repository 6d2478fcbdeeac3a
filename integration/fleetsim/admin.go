package fleetsim

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Admin is an administrator of the fleet.
type Admin struct {
	conn    *grpc.ClientConn
	address string
	roots   *x509.CertPool
}

// NewAdmin connects to a replica at address with the context that a control plane
// left in a file.
func NewAdmin(contextFile, address string) (*Admin, error) {
	text, err := os.ReadFile(contextFile)
	if err != nil {
		return nil, err
	}
	var file struct {
		Contexts []struct {
			CAPEM          string `yaml:"caPem"`
			CertificatePEM string `yaml:"certificatePem"`
			PrivateKeyPEM  string `yaml:"privateKeyPem"`
		} `yaml:"contexts"`
	}
	if err := yaml.Unmarshal(text, &file); err != nil || len(file.Contexts) != 1 {
		return nil, fmt.Errorf("%s: not a file with one context", contextFile)
	}
	own := file.Contexts[0]
	pair, err := tls.X509KeyPair([]byte(own.CertificatePEM), []byte(own.PrivateKeyPEM))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", contextFile, err)
	}
	a := &Admin{address: address, roots: x509.NewCertPool()}
	a.roots.AppendCertsFromPEM([]byte(own.CAPEM))
	if a.conn, err = a.dial(&pair); err != nil {
		return nil, err
	}
	return a, nil
}

// Close ends the connection.
func (a *Admin) Close() error { return a.conn.Close() }

// Service are the replica's calls.
func (a *Admin) Service() resealv1.AdminServiceClient { return resealv1.NewAdminServiceClient(a.conn) }

func (a *Admin) dial(pair *tls.Certificate) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+a.address, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(a.roots, pair))),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(256<<20)))
}

// clientTLS verifies the control plane by the fleet's authority. A nil pair is a
// caller without a certificate.
func clientTLS(roots *x509.CertPool, pair *tls.Certificate) *tls.Config {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, // of the name alone; VerifyConnection does the rest
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	return config
}

// Apply applies a manifest and returns the revision.
func (a *Admin) Apply(ctx context.Context, text string) (int64, error) {
	objects, err := manifest.Parse("simulated", []byte(text))
	if err != nil {
		return 0, err
	}
	request := &resealv1.ApplyRequest{}
	for _, object := range objects {
		request.Resources = append(request.Resources, object.Resource)
	}
	answer, err := a.Service().Apply(ctx, request)
	return answer.GetRevision(), err
}

// Rotate prepares a new epoch of the keyring "default" and returns its number.
func (a *Admin) Rotate(ctx context.Context) (uint64, error) {
	answer, err := resealv1.NewKeyringServiceClient(a.conn).Rotate(ctx, &resealv1.RotateRequest{})
	return answer.GetEpoch(), err
}

// Covered returns how many edges are known to encrypt with an epoch.
func (a *Admin) Covered(ctx context.Context, epoch uint64) (int, error) {
	answer, err := resealv1.NewKeyringServiceClient(a.conn).Status(ctx, &resealv1.StatusRequest{Keyring: resealv1.DefaultKeyring})
	if err != nil {
		return 0, err
	}
	if len(answer.GetKeyrings()) != 1 {
		return 0, errors.New("there is no keyring " + resealv1.DefaultKeyring)
	}
	covered := 0
	for _, edge := range answer.GetKeyrings()[0].GetEdges() {
		if edge.GetActive() == epoch {
			covered++
		}
	}
	return covered, nil
}

// Synced returns how many edges serve the newest revision, as the control plane sees
// it.
func (a *Admin) Synced(ctx context.Context) (int, error) {
	answer, err := resealv1.NewFleetServiceClient(a.conn).ListEdges(ctx, &resealv1.ListEdgesRequest{})
	synced := 0
	for _, edge := range answer.GetEdges() {
		if edge.GetState() == resealv1.Edge_STATE_SYNCED {
			synced++
		}
	}
	return synced, err
}

// Requests returns the requests of a pool that all edges have reported together.
func (a *Admin) Requests(ctx context.Context, pool string) (uint64, error) {
	answer, err := resealv1.NewTallyServiceClient(a.conn).GetStats(ctx, &resealv1.GetStatsRequest{Name: pool})
	var requests uint64
	for _, stats := range answer.GetPools() {
		requests += stats.GetRequests()
	}
	return requests, err
}
