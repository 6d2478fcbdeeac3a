package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const userLong = `Make, list and revoke users: people and tools that call the control plane, each with a
role. A viewer reads everything but secrets; an operator also changes resources,
drains edges and rotates keys; an administrator also makes users, enrols and
revokes. auth can-i --list says what you may do.`

func newUserCommand(a *app) *cobra.Command {
	return newGroupCommand("user", "Make, list and revoke users of this command", userLong,
		newUserCreateCommand(a), newUserListCommand(a), newUserRevokeCommand(a))
}

// userView is a user as -o json and yaml show it.
type userView struct {
	Name      string `json:"name"`
	Role      string `json:"role"`
	CreatedAt string `json:"createdAt"`
	CreatedBy string `json:"createdBy"`
	ExpiresAt string `json:"expiresAt"`
	RenewedAt string `json:"renewedAt"`
	TTL       string `json:"ttl"`
}

func viewUser(u *resealv1.User) userView {
	return userView{Name: u.GetName(), Role: resealv1.Label(u.GetRole()), CreatedAt: utcStamp(u.GetCreatedAt()),
		CreatedBy: u.GetCreatedBy(), ExpiresAt: utcStamp(u.GetExpiresAt()), RenewedAt: utcStamp(u.GetRenewedAt()),
		TTL: configured(u.GetTtl())}
}

// userCreation is one run of user create.
type userCreation struct {
	*app
	format     *format
	name, role string
	ttl        time.Duration
	file       string
}

func newUserCreateCommand(a *app) *cobra.Command {
	u := &userCreation{app: a}
	cmd := &cobra.Command{
		Use:   "create NAME --role ROLE",
		Short: "Make a user, and the context file to give to it",
		Long: `Make a user, and the context file to give to it: where the control plane is, what
to trust, and the user's certificate and key. The key is made here and sent
nowhere. The file is written to --file, with mode 0600, or else to standard
output; whoever has it is the user.

The certificate is short-lived. resealctl renews it by itself when it is used and
less than a third of its life is left, and writes it to the file that it was read
from. Who has not used it for longer needs a new user.`,
		Example: `  resealctl user create vera --role viewer --file vera.yaml
  resealctl user create ci --role operator --ttl 720h > ci.yaml`,
		Args: cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&u.role, "role", "", "`role` of the user: viewer, operator or admin")
	cmd.Flags().DurationVar(&u.ttl, "ttl", 24*time.Hour, "how long each certificate is valid, 1m to 8760h")
	cmd.Flags().StringVar(&u.file, "file", "", "`file` to write the context to; its other contexts are kept")
	_ = cmd.MarkFlagRequired("role")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(userRoles(), noFiles))
	u.format = registerFormat(cmd, "context", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		u.name = args[0]
		return u.run(cmd.Context())
	}
	return cmd
}

// userRoles are the roles that users can have.
func userRoles() []string {
	var roles []string
	for role := resealv1.Role_ROLE_VIEWER; role <= resealv1.Role_ROLE_ADMIN; role++ {
		roles = append(roles, resealv1.Label(role))
	}
	return roles
}

func (u *userCreation) run(ctx context.Context) error {
	index := slices.Index(userRoles(), strings.ToLower(u.role))
	if index < 0 {
		return usagef("--role %q: want one of %s", u.role, strings.Join(userRoles(), ", "))
	}
	// Before the user exists: a file that can't be read would be found too late.
	file, err := u.readTarget()
	if err != nil {
		return err
	}
	client, err := u.connect()
	if err != nil {
		return err
	}
	request, keyPEM, err := newCertificateRequest()
	if err != nil {
		return err
	}
	response, err := client.enrollment.CreateUser(ctx, &resealv1.CreateUserRequest{
		Name: u.name, Role: resealv1.Role_ROLE_VIEWER + resealv1.Role(index), CertificateRequest: request, Ttl: durationpb.New(u.ttl),
	})
	if err != nil {
		return err
	}
	made := namedContext{
		Name: response.GetUser().GetName(), ControlPlane: client.target.controlPlane, TrustDomain: response.GetTrustDomain(),
		CAPEM: response.GetCaPem(), CertificatePEM: response.GetCertificatePem(), PrivateKeyPEM: string(keyPEM),
	}
	return u.hand(file, made, response.GetUser())
}

// readTarget reads the file that the context is written to.
func (u *userCreation) readTarget() (*contextFile, error) {
	if u.file == "" {
		return &contextFile{}, nil
	}
	file, err := u.readContexts(u.file)
	if errors.Is(err, fs.ErrNotExist) {
		return &contextFile{}, nil
	}
	return file, err
}

// hand writes the context where it was asked for.
func (u *userCreation) hand(file *contextFile, made namedContext, user *resealv1.User) error {
	file.put(made)
	if file.CurrentContext == "" {
		file.CurrentContext = made.Name
	}
	if u.file != "" {
		if err := writeContexts(u.file, file); err != nil {
			return errors.Join(err, errors.New("the user was made, but its key is lost: make another one"))
		}
	}
	switch {
	case u.format.structured():
		view := map[string]any{"user": viewUser(user)}
		if u.file == "" {
			view["context"] = map[string]any{"name": made.Name, "controlPlane": made.ControlPlane, "trustDomain": made.TrustDomain,
				"caPem": made.CAPEM, "certificatePem": made.CertificatePEM, "privateKeyPem": made.PrivateKeyPEM}
		}
		return u.printDocument(u.format, view)
	case u.file != "":
		u.printf("user/%s created with role %s; its context is in %s, and expires %s unless it is used\n",
			user.GetName(), resealv1.Label(user.GetRole()), u.file, expiry(user.GetExpiresAt().AsTime()))
		return nil
	}
	data, err := encodeContexts(file)
	if err != nil {
		return err
	}
	_, err = u.out.Write(data)
	return err
}

// newCertificateRequest makes a key, and the PKCS #10 request for it.
func newCertificateRequest() (request, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if request, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return request, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), err
}

func newUserListCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the users, with those whose certificate has expired",
		Args:  cobra.NoArgs,
	}
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		list, err := client.enrollment.ListUsers(cmd.Context(), &resealv1.ListUsersRequest{})
		if err != nil {
			return err
		}
		return a.printUsers(format, list.GetUsers())
	}
	return cmd
}

func (a *app) printUsers(f *format, users []*resealv1.User) error {
	views := make([]userView, len(users))
	for i, u := range users {
		views[i] = viewUser(u)
	}
	switch {
	case f.structured():
		return a.printDocument(f, map[string]any{"users": views})
	case f.value == "name":
		for _, u := range users {
			a.printf("%s\n", u.GetName())
		}
		return nil
	case len(users) == 0:
		a.warnf("No users.\n")
		return nil
	}
	t := newTable(a.out, "NAME", "ROLE", "EXPIRES", "TTL", "CREATED BY", "AGE")
	for i, u := range users {
		t.add(u.GetName(), views[i].Role, expiry(u.GetExpiresAt().AsTime()), views[i].TTL, orNone(u.GetCreatedBy()), age(u.GetCreatedAt()))
	}
	t.flush()
	return nil
}
